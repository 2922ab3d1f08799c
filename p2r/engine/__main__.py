"""`python -m p2r.engine JOB`: former name of `python -m p2r JOB`, kept for one version."""

import runpy
from contextlib import suppress

from p2r.errors import InputError
from p2r.logs import configure, say

if __name__ == "__main__":
    with suppress(InputError):  # an unknown format of logs is refused by the command itself
        configure()
    say("note: python -m p2r.engine is now called python -m p2r")
    runpy.run_module("p2r", run_name="__main__", alter_sys=True)
