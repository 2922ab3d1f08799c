"""Ray orchestration: where and when. No tensor arithmetic happens here."""
