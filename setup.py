"""Build steps that add to a wheel and a source archive the commit that they were built from, and the jobs."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
JOBS = ("jobs/*.yaml", "jobs/job.schema.json", "jobs/tasks/*.yaml")  # not jobs/results: pictures and logs


class BuildWithCommitAndJobs(build_py):
    """Add `p2r/COMMIT` and `p2r/jobs` to what is built; an editable installation reads git and `jobs/` itself."""

    def run(self) -> None:
        """Build the packages, then add to them."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "p2r"
        shutil.rmtree(package / "jobs", ignore_errors=True)
        for pattern in JOBS:
            for source in sorted(ROOT.glob(pattern)):
                target = package / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        write_commit(package)


class ArchiveWithCommit(sdist):
    """Add `p2r/COMMIT` to a source archive, which has no git to ask."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Write the archive's folder."""
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir) / "p2r")


def write_commit(package: Path) -> None:
    """Write `COMMIT` into a folder: `$P2R_COMMIT`, else that of the source archive, else what git says, else nothing."""
    commit = os.environ.get("P2R_COMMIT", "")
    if not commit and (ROOT / "p2r/COMMIT").exists():
        commit = (ROOT / "p2r/COMMIT").read_text()
    if not commit and (ROOT / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        commit = done.stdout.strip()
    (package / "COMMIT").unlink(missing_ok=True)
    if commit:
        (package / "COMMIT").write_text(commit)


setup(cmdclass={"build_py": BuildWithCommitAndJobs, "sdist": ArchiveWithCommit})
