"""The documentation is true: links lead somewhere, commands and keys exist, code runs, drawings and reference are up to date."""

import ast
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import p2r
from docs.drawings import DRAWINGS
from docs.reference_pages import PAGES, commands_page, docstring_lines, job_page
from p2r.cache import cache_folder
from p2r.evaluate import prepared
from p2r.evaluate.task_files import TaskConfig
from p2r.job import read_job
from p2r.retries import S3Settings

ROOT = Path(__file__).parent.parent
PAGES_OF_THE_REPOSITORY = [
    ROOT / name
    for name in (
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
        *("jobs/README.md", "jobs/RESULTS.md", "infra/README.md", "infra/RUNBOOK.md"),
    )
]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
ALL = [*PAGES_OF_THE_REPOSITORY, *DOCS]
GENERATED = {ROOT / "docs" / path for path in PAGES}
SCHEMA = json.loads((ROOT / "jobs/job.schema.json").read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors_of(text: str) -> set[str]:
    """The anchors that Markdown gives to headings, on GitHub and in mkdocs alike."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_every_link_and_picture_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() or file in GENERATED, target
        if anchor:
            assert anchor in anchors_of(file.read_text()), target


def test_a_wrong_anchor_would_be_found() -> None:
    assert anchors_of("# A shortcut: the place\n```\n# no heading\n```\n## Two") == {"a-shortcut-the-place", "two"}


_COPIES = {"pixels": "p2r.export.bundle_script"}
"""Modules that an export copies into its folder, and their originals."""


def code_blocks(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{name_of(page)}-{number}")
        for page in [ROOT / "README.md", *DOCS]
        for number, block in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        )
    ]


@pytest.mark.parametrize("block", code_blocks("python"))
def test_every_python_block_compiles_and_imports_names_that_exist(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(_COPIES.get(str(node.module), str(node.module)))
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "p2r":
            assert node.attr in importlib.import_module("p2r").__all__


def test_the_example_of_the_loss_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/explanation/loss.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    names["loss"].backward()
    assert names["tau"].grad is not None


def field_at(path: list[str]) -> dict[str, Any] | None:
    """The schema of a job's key, `pretrain.loss.temperature` as a list; None if there is none."""
    fields: list[dict[str, Any]] = [SCHEMA]
    for key in path:
        sections = [one for field in fields for one in expanded(field)]
        found = [one["properties"][key] for one in sections if key in one.get("properties", {})]
        if not found:  # names that the user chooses
            found = [
                one["additionalProperties"] for one in sections if isinstance(one.get("additionalProperties"), dict)
            ]
            found += [{} for one in sections if one.get("additionalProperties") is True]  # of any kind
            patterns = [item for one in sections for item in one.get("patternProperties", {}).items()]
            found += [field for pattern, field in patterns if re.search(pattern, key)]
        if not found:
            return None
        fields = found
    return fields[0]


def expanded(field: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in field:
        return expanded(SCHEMA["$defs"][field["$ref"].rpartition("/")[2]])
    return [one for option in field.get("anyOf", ()) for one in expanded(option)] or [field]


def paths_in(value: Any, prefix: tuple[str, ...] = ()) -> list[list[str]]:
    if not isinstance(value, dict):
        return [list(prefix)]
    return [path for key, child in value.items() for path in paths_in(child, (*prefix, str(key)))]


@pytest.mark.parametrize("block", code_blocks("yaml"))
def test_every_key_of_a_yaml_block_is_a_key_of_a_job_or_of_a_task(block: str) -> None:
    values = yaml.safe_load(block)
    if "image_name" in values:
        assert values.keys() <= TaskConfig.model_fields.keys()
        return
    for path in paths_in(values):
        assert field_at(path) is not None, ".".join(path)


@pytest.mark.parametrize("block", [block for block in code_blocks("yaml") if "finetune:" in str(block.values[0])])
def test_a_job_takes_every_block_of_fine_tuning_as_it_stands(block: str, tmp_path: Path) -> None:
    values = yaml.safe_load(block)
    finetune = {"backbone": "s3://bucket/backbones/brain/1", "tasks": ["task.yaml"], **values["finetune"]}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"kind": "finetune", "name": "x", "finetune": finetune}))
    read_job(tmp_path / "job.yaml")


def test_a_job_that_a_page_shows_in_full_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2R_CORPUS", "s3://bucket/runs/corpus/corpus")
    jobs = [block.values[0] for block in code_blocks("yaml") if "kind:" in str(block.values[0])]
    assert jobs
    for number, text in enumerate(jobs):
        (tmp_path / f"{number}.yaml").write_text(str(text))
        read_job(tmp_path / f"{number}.yaml")


def test_the_page_of_variables_states_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/reference/storage.md").read_text()
    monkeypatch.delenv("P2R_CACHE", raising=False)
    assert f"default: `~/{cache_folder().relative_to(Path.home())}`" in page
    assert f"frozen features, GiB; default: {prepared._DEFAULT_GIB} |" in page
    times = S3Settings()
    assert f"fails repeatedly ({times.deadline_s:g} s), of a silent answer ({times.read_timeout_s:g} s)" in page


def test_every_key_that_a_page_names_is_a_key_of_a_job() -> None:
    sections = "|".join(
        name for name, field in SCHEMA["properties"].items() if any("properties" in e for e in expanded(field))
    )
    seen = set()
    for page in [ROOT / "README.md", ROOT / "jobs/README.md", *DOCS]:
        for key in re.findall(rf"`((?:{sections})(?:\.(?!yaml\b)\w+)+)\b", page.read_text()):
            assert field_at(key.split(".")) is not None, f"{name_of(page)}: {key}"
            seen.add(key)
    assert len(seen) > 40
    assert field_at(["pretrain", "no_such_key"]) is None


def test_every_variable_that_a_page_names_is_read_somewhere() -> None:
    code = "\n".join(
        path.read_text()
        for folder in ("p2r", "cluster", "jobs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    )
    code += (ROOT / "setup.py").read_text()
    named = {name for page in [ROOT / "README.md", *DOCS] for name in re.findall(r"\bP2R_[A-Z_]+\b", page.read_text())}
    assert len(named) > 15
    assert {name for name in named if name not in code} == set()


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_committed_drawings_are_those_of_the_code(name: str) -> None:
    committed = (ROOT / f"docs/images/{name}.svg").read_text()
    assert committed == DRAWINGS[name](), "run: python -m docs.drawings"
    assert not re.search(r"(?:href|src|url)\s*[=(]\s*[\"']?(?:https?:)?//", committed)


def test_the_page_of_the_job_file_has_every_key_with_its_meaning() -> None:
    page = job_page()
    for section in (SCHEMA, *SCHEMA["$defs"].values()):
        for key, field in section.get("properties", {}).items():
            assert f"| `{key}` |" in page
            assert field.get("description"), f"{key} has no meaning"
    assert "| `temperature` | number (> 0" in page


def test_the_page_of_commands_has_every_command_with_its_options() -> None:
    page = commands_page()
    assert "## p2r tune-batch" in page
    assert "| `--memory-gib` | Memory of a worker" in page


def test_a_docstring_becomes_headings_and_lists() -> None:
    text = "Load a backbone.\n\n    p2r.load(x)\n\nArgs:\n    url: Where it is,\n        exactly.\n\nRaises:\n    StorageError: absent."
    lines = [line for line in docstring_lines(text) if line]
    assert lines == [
        *("Load a backbone.", "    p2r.load(x)", "**Args**", "- `url`: Where it is,", "  exactly."),
        *("**Raises**", "- `StorageError`: absent."),
    ]


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE))
    site = {str(page.relative_to(ROOT / "docs")) for page in DOCS}
    site |= set(PAGES) | {f"repository/{name_of(page)}" for page in PAGES_OF_THE_REPOSITORY}
    assert named == site


def test_the_version_is_in_one_place(repository: Path) -> None:
    pyproject = tomllib.loads((repository / "pyproject.toml").read_text())
    assert pyproject["project"]["dynamic"] == ["version"]
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "p2r.version.__version__"}
    version = p2r.__version__
    changelog = (repository / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(version)}, \d{{4}}-\d{{2}}-\d{{2}}", headings[1])
    for page in (repository / "README.md", *DOCS):
        assert set(re.findall(r"p2r-(\d+\.\d+\.\d+)-py3", page.read_text())) <= {version}


def test_the_commands_that_lay_out_public_data_make_the_files_that_the_tasks_read(tmp_path: Path) -> None:
    text = (ROOT / "docs/reference/data.md").read_text()
    for name in ("ACDC/training/patient001/patient001_frame01", "Task04_Hippocampus/imagesTr/hippocampus_001"):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_text("scan")
    (tmp_path / "ACDC/training/patient001/patient001_frame01_gt.nii.gz").write_text("label")
    (tmp_path / "ACDC/training/patient001/patient001_4d.nii.gz").write_text("cine")
    (tmp_path / "Task04_Hippocampus/labelsTr").mkdir()
    (tmp_path / "Task04_Hippocampus/labelsTr/hippocampus_001.nii.gz").write_text("label")
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        subprocess.run(["sh", "-euc", block.replace("/data/", f"{tmp_path}/data/")], cwd=tmp_path, check=True)
    made = {str(path.relative_to(tmp_path)): path.read_text() for path in (tmp_path / "data").rglob("*.gz")}
    assert made == {
        "data/acdc/images/patient001_frame01.nii.gz": "scan",
        "data/acdc/labels/patient001_frame01.nii.gz": "label",
        "data/msd_hippocampus/images/hippocampus_001.nii.gz": "scan",
        "data/msd_hippocampus/labels/hippocampus_001.nii.gz": "label",
    }


def test_nobody_is_told_to_install_p2r_from_an_index() -> None:
    """PyPI's project called p2r is another one."""
    told = re.compile(r"pip install (?:-\S+ )*[\"']?p2r(?![\w-])")
    assert told.search("pip install -U 'p2r[onnx]'") and not told.search(
        "pip install 'dist/p2r-0.1.0-py3-none-any.whl'"
    )
    folders = ("p2r", "cluster", "docs", "jobs", "infra", "examples", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path != Path(__file__)]
    texts = {".py", ".md", ".yaml", ".yml", ".ipynb", ".sh", ""}
    files = [path for path in files if path.is_file() and path.suffix in texts] + [
        *ROOT.glob("*.md"),
        ROOT / "Makefile",
    ]
    assert len(files) > 300
    assert [name_of(path) for path in files if told.search(path.read_text(errors="ignore"))] == []


def test_the_page_of_the_installation_names_every_extra() -> None:
    table = (ROOT / "docs/how-to/install.md").read_text().split("## Extras\n")[1].split("\n## ")[0]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\|([^|]+)\|", table, re.MULTILINE)))) == set(extras)


def test_the_site_builds_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|link|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]+", page.read_text()
        )
        assert not [one for one in loaded if 'rel="canonical"' not in one], page
    shutil.rmtree(tmp_path / "site")
