"""`python -m cluster run JOB`: the command in the first line of every `jobs/*.yaml`, which makes a job file an entrypoint."""

from cluster.cli import main

main()
