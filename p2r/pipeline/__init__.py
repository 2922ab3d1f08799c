"""A job from ingest to report, stage by stage, for any executor; and the executor of one process."""
