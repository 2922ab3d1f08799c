"""What the tests of benchmarks share: one folder for the corpus of virtual subjects, which takes seconds to make."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first benchmark that streams keeps its corpus for the others."""
    return tmp_path_factory.mktemp("bench") / "data"
