"""Pipeline of a job from ingest to report, stage by stage, for any executor; and the executor for one process."""
