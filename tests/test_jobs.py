import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from p2r.job import JOB_VARIABLES, json_schema, read_job

JOBS = sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml"))
TASKS = sorted((Path(__file__).parent.parent / "jobs/tasks").glob("*.yaml"))


@pytest.fixture(autouse=True)
def data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_DATA", "/data")
    for name in JOB_VARIABLES:
        monkeypatch.setenv(name, "/data/given")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_is_valid_executable_and_documented(path: Path) -> None:
    job = read_job(path)
    assert os.access(path, os.X_OK)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env -S python -m cluster run"
    assert lines[1] == "# yaml-language-server: $schema=job.schema.json"
    comments = "\n".join(line for line in lines if line.startswith("#"))
    for word in ("Hardware:", "Time:", "Command:", "Expected result:"):
        assert word in comments, f"{path.name} does not state its {word}"
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())
    for task in job.finetune.tasks if job.finetune else ():
        assert Path(task).is_file()


def test_jobs_read_no_variable_that_is_not_listed_and_have_no_default_for_any() -> None:
    for path in (*JOBS, *TASKS):
        for name, default in re.findall(r"\$\{(\w+)(:-[^}]*)?\}", path.read_text()):
            assert name in {"P2R_DATA", *JOB_VARIABLES} and not default, f"{path.name}: {name}{default}"


def test_the_settings_of_every_documented_command_are_accepted(repository: Path) -> None:
    pages = [*JOBS, *TASKS, *repository.glob("jobs/*.md"), *repository.glob("docs/**/*.md"), repository / "README.md"]
    found = 0
    for page in pages:
        text = page.read_text().replace("\\\n", "")
        for job, arguments in re.findall(r"(?:p2r run|python -m p2r) (jobs/[\w-]+\.yaml)([^`\n]*)", text):
            if "--set" not in arguments or "..." in arguments:
                continue
            words = shlex.split(arguments, comments=True)
            settings = tuple(word for option, word in itertools.pairwise(words) if option == "--set")
            read_job(repository / job, settings)
            found += 1
    assert found > 10


@pytest.mark.parametrize("path", [*JOBS, *TASKS], ids=lambda path: path.stem)
def test_a_command_in_a_head_gives_every_variable_that_its_job_reads(
    path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("P2R_DATA", *JOB_VARIABLES):
        monkeypatch.delenv(name)
    commands = re.findall(
        r"^#(.*)(p2r run|p2r submit|ray job submit) (?:-.* -- )?(jobs/[\w-]+\.yaml)(.*)", path.read_text(), re.M
    )
    for before, _, job, arguments in commands:
        settings = [word.strip("'") for word in re.findall(r"--set ('[^']*'|\S+)", arguments)]
        needed: dict[str, str] = {}
        read = read_job(repository / job, tuple(settings), unset=needed)
        texts = [
            Path(task).read_text() for task in (read.finetune.tasks if read.finetune else ()) if Path(task).exists()
        ]
        names = {*needed, *re.findall(r"^[^#]*\$\{(\w+)\}", "\n".join(texts), re.M)}
        assert names <= set(re.findall(r"(\w+)=", before)), f"{job}{arguments}"
        assert "/runs/" not in before or "P2R_STORAGE=" in before, (
            "where the backbone is, and where an earlier command wrote it"
        )


def test_every_documented_publication_names_a_job_that_publishes(repository: Path) -> None:
    pages = [*JOBS, *repository.glob("jobs/*.md"), *repository.glob("docs/**/*.md"), repository / "README.md"]
    found = [one for page in pages for one in re.findall(r"p2r publish (jobs/[\w-]+\.yaml)([^`\n]*)", page.read_text())]
    assert len(found) > 3
    for path, arguments in found:
        words = list(itertools.pairwise(shlex.split(arguments, comments=True)))
        job = read_job(repository / path, tuple(word for option, word in words if option == "--set"))
        assert job.publish is not None and job.pretrain is not None, path
        for step in [int(word) for option, word in words if option == "--step"]:
            assert step <= job.pretrain.steps and step % job.pretrain.checkpoint_interval == 0, path


def test_the_committed_schema_is_current(repository: Path) -> None:
    committed = json.loads((repository / "jobs/job.schema.json").read_text())
    assert committed == json_schema(), "run: p2r schema > jobs/job.schema.json"


def test_the_publish_job_fits_the_pretrain_job(repository: Path) -> None:
    publish, pretrain = (read_job(repository / f"jobs/{name}.yaml") for name in ("publish", "pretrain"))
    assert publish.storage == pretrain.storage
    assert publish.pretrain is not None and pretrain.pretrain is not None
    free = {"checkpoint_interval", "report_interval", "keep_checkpoints"}
    assert publish.pretrain.model_dump(exclude=free) == pretrain.pretrain.model_dump(exclude=free)


def test_a_job_file_is_a_program(repository: Path, tmp_path: Path) -> None:
    """What `ray job submit JOB` does with it, up to the first thing that it cannot know."""
    job = tmp_path / "job.yaml"
    job.write_text("#!/usr/bin/env -S python -m cluster run\nkind: pretrain\nname: x\n")
    job.chmod(0o755)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [job], cwd=repository, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "kind pretrain needs the section pretrain" in done.stderr
    assert "Traceback" not in done.stderr
