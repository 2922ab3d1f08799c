"""README and docs are true: their commands exist, the tree is the tree, the code that reads shards runs."""

import json
import re
import shlex
import tarfile
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
import pytest
import typer
import webdataset
import yaml

from cluster.cli import app
from p2r.config import IngestConfig, SessionsConfig
from p2r.data.corpus import ingest_locally
from p2r.storage import Storage

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
TEXTS = [README, *DOCS.values()]


def commands() -> list[str]:
    """The command lines of README and docs: indented in the README, in blocks of shell elsewhere."""
    lines = re.findall(r"^    (.+)$", README, re.MULTILINE)
    for text in TEXTS:
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            lines += block.splitlines()
    return [line.strip().split("  ")[0].split("#")[0].strip() for line in lines]


def test_every_p2r_command_exists_with_its_options() -> None:
    group = typer.main.get_command(app)
    seen = set()
    for command in commands():
        words = shlex.split(command)
        while words and "=" in words[0]:
            words = words[1:]
        if not words or words[0] != "p2r":
            continue
        known = group.commands[words[1]]  # type: ignore[attr-defined]
        seen.add(words[1])
        options = {name for parameter in known.params for name in parameter.opts}
        assert {word for word in words[2:] if word.startswith("-")} <= options, command
    assert seen == {
        *("run", "validate", "status", "inspect", "verify", "schema", "views", "tune-batch", "embed", "predict"),
        *("submit", "compare", "plan", "check", "init", "publish", "sign", "export", "push", "pull"),
        *("list", "show", "promote", "gc"),
    }


def test_every_make_target_exists(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text()
    for command in commands():
        if command.startswith("make "):
            assert f"\n{command.split()[1]}:" in makefile


def test_every_file_that_it_names_exists(repository: Path) -> None:
    names = set(re.findall(r"\]\(([^)#:]+)\)", README))
    for text in TEXTS:
        names |= set(re.findall(r"`((?:p2r|cluster|jobs|infra|tests|docs)/[^`\s]*)`", text))
        names |= set(re.findall(r"\b((?:jobs|tests)/[\w/-]+\.(?:yaml|py))", text))
    assert len(names) > 40
    for name in names:
        assert (repository / name).exists(), name


def test_every_storage_that_it_names_is_made_by_a_job_that_it_names(repository: Path) -> None:
    jobs = {yaml.safe_load(path.read_text())["name"] for path in (repository / "jobs").glob("*.yaml")}
    everything = "\n".join(TEXTS)
    given = set(re.findall(r"(?:storage=|-o )~/p2r-runs/([\w-]+)", everything))
    assert set(re.findall(r"p2r-runs/([\w-]+)", everything)) <= {*jobs, *given, "mine"}


def test_every_backbone_and_model_of_a_job_that_it_names_is_made_by_that_job(repository: Path) -> None:
    found = set(re.findall(r"~/p2r-runs/([\w-]+)/(backbones|models)/([\w-]+)", "\n".join(TEXTS)))
    assert len(found) > 3
    made = {("mine", "backbones", "mine"), ("mine", "models", "mine")}  # `p2r init mine`
    for path in (repository / "jobs").glob("*.yaml"):
        job = yaml.safe_load(path.read_text())
        made |= {(job["name"], "models", Path(task).stem) for task in job.get("finetune", {}).get("tasks", ())}
        made |= {(job["name"], "backbones", job["publish"]["name"])} if "publish" in job else set()
    assert found <= made


def test_the_tree_is_the_tree(repository: Path) -> None:
    block = README.split("## The tree\n")[1].split("\n## ")[0]
    folder = ""
    listed: dict[str, set[str]] = {"": set(), "p2r/": set()}
    for indent, names in re.findall(r"^    ( *)((?:\S+, )*\S+)  ", block, re.MULTILINE):
        folder = "p2r/" if indent else ""
        for name in names.split(", "):
            assert (repository / folder / name).exists(), name
            listed[folder].add(name.rstrip("/"))
    folders = ("p2r", "cluster", "jobs", "infra", "docs", "examples", "tests")
    assert listed[""] == {name for name in folders if (repository / name).is_dir()}
    there = {path.name for path in (repository / "p2r").iterdir() if not path.name.startswith("__")}
    assert listed["p2r/"] == there - {"py.typed"}


def test_the_readme_is_short_and_names_the_command_that_every_change_must_pass(repository: Path) -> None:
    assert len(README.splitlines()) <= 200
    two_commands = README.split("## Two commands\n\n")[1].split("\n\n")[0]
    assert [line.strip() for line in two_commands.splitlines()] == ["make demo", "make test"]
    assert (repository / ".ci/run").read_text().splitlines()[-1] == "make test"


def test_every_job_is_in_the_table(repository: Path) -> None:
    table = README.split("## Jobs\n")[1]
    for path in (repository / "jobs").glob("*.yaml"):
        assert f"`jobs/{path.name}`" in table
        assert f"`{path.name}`" in (repository / "jobs/README.md").read_text()


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset's
@pytest.mark.parametrize("kind", ["int16", "float", "oblique", "cine"])
def test_the_stock_library_and_five_lines_read_the_shards(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    shape = (20, 24, 5, 3) if kind == "cine" else (20, 24, 18)
    data = rng.integers(-200, 3000, shape) / (3 if kind == "float" else 1)
    affine = np.diag([-2.0, 1.5, 8.0, 1.0])
    if kind == "oblique":
        affine = np.array([[0.1, -1.4, 0.3, 5], [0.2, 0.3, 3.9, -7], [-1.5, 0.0, 0.4, 2], [0, 0, 0, 1]])
    (tmp_path / "scans").mkdir()
    image = nibabel.Nifti1Image(data.astype(np.float32 if kind == "float" else np.int16), affine)
    image.to_filename(tmp_path / "scans/sub-01_T1w.nii.gz")
    config = IngestConfig(sources=(str(tmp_path / "scans"),), licence="CC0-1.0")
    for _ in ingest_locally(config, Storage(str(tmp_path / "corpus"))):
        pass

    voxels = _five_lines()
    (shard,) = (tmp_path / "corpus").glob("*.tar")
    records = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len(records) == 1
    assert {type(records[0][name]) for name in ("json", "planes")} == {bytes}
    expected = np.asarray(nibabel.as_closest_canonical(image).dataobj)
    found = voxels(records[0])
    assert np.array_equal(found, expected if kind == "cine" else expected[..., None])
    with tarfile.open(shard) as tar:
        assert sorted(tar.getnames()) == ["sub-01_T1w.json", "sub-01_T1w.planes"]


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset's
def test_the_same_five_lines_read_each_contrast_of_a_session(tmp_path: Path) -> None:
    written = {}
    for number, name in enumerate(["T1w", "FLAIR"]):
        data = np.random.default_rng(number).integers(0, 3000, (20, 24, 5)).astype(np.int16)
        path = tmp_path / "scans" / f"sub-01_{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        image = nibabel.Nifti1Image(data, np.diag([-2.0, 1.5, 8.0, 1.0]))
        image.to_filename(path)
        written[name] = np.asarray(nibabel.as_closest_canonical(image).dataobj)[..., None]
    sessions = SessionsConfig(contrasts={"t1": "T1w", "flair": "FLAIR", "t2": "T2w"})
    config = IngestConfig(sources=(str(tmp_path / "scans"),), licence="CC0-1.0", sessions=sessions)
    list(ingest_locally(config, Storage(str(tmp_path / "corpus"))))
    (shard,) = (tmp_path / "corpus").glob("*.tar")
    (record,) = webdataset.WebDataset(str(shard), shardshuffle=False)
    assert {name for name in record if name.endswith("planes")} == {"t1.planes", "flair.planes"}
    np.testing.assert_array_equal(_five_lines()(record, "t1."), written["T1w"])
    np.testing.assert_array_equal(_five_lines()(record, "flair."), written["FLAIR"])


def _five_lines() -> Any:
    code = re.search(r"```python\n(def voxels.*?)```", DOCS["docs/how-to/stream.md"], re.DOTALL)
    assert code is not None and len(code[1].splitlines()) == 6
    names: dict[str, Any] = {"json": json, "np": np, "blosc2": blosc2}
    exec(code[1], names)
    return names["voxels"]
