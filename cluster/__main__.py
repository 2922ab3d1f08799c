"""`python -m cluster run JOB`: what the first line of every `jobs/*.yaml` calls, so that a job file is an entrypoint."""

from cluster.cli import main

main()
