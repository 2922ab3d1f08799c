"""Ray orchestration of jobs. No tensor arithmetic happens here."""
