"""`python -m cluster run JOB`: the command in the first line of every `jobs/*.yaml`, which makes a job file an entrypoint."""

import sys

from cluster.cli import main

sys.exit(main())
