"""`python -m p2r.engine JOB`: former name of `python -m p2r JOB`, kept for one version."""

import runpy

from p2r.logs import configure, say

if __name__ == "__main__":
    configure(None)
    say("note: python -m p2r.engine is now called python -m p2r")
    runpy.run_module("p2r", run_name="__main__", alter_sys=True)
