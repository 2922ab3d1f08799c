"""What contributors are told is true: hooks, workflows and issue forms name things that exist; files keep the rules."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.file_rules import large_files, wrong_ends
from tests.mutate import mutants_of

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0 or not done.stdout:
        pytest.skip("not a clone")
    return [ROOT / name for name in done.stdout.splitlines()]


def test_every_text_file_ends_with_one_newline_and_none_is_large() -> None:
    files = tracked_files()
    written_by_programs = {".png", ".svg", ".json", ".log"}
    assert wrong_ends([path for path in files if path.suffix not in written_by_programs]) == []
    assert large_files(files) == []


def test_the_rules_find_a_missing_newline_and_a_large_file(tmp_path: Path) -> None:
    contents = {"none": b"a", "one": b"a\n", "two": b"a\n\n", "empty": b"", "large": b"a" * (512 * 1024) + b"\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in contents]
    assert [message.split(":")[0] for message in wrong_ends(paths)] == [
        str(tmp_path / name) for name in ("none", "two")
    ]
    assert [message.split(":")[0] for message in large_files(paths)] == [str(tmp_path / "large")]


def test_the_example_test_of_the_tour_passes() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    names["test_more_similar_pairs_have_a_smaller_loss"]()


def test_the_four_checks_of_the_tour_are_those_of_make_test() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\ntest: ")[1].split("\n\n")[0]
    told = re.findall(r"^\| [\w ]+ \| `(.+)` \|$", CONTRIBUTING, re.MULTILINE)
    told = [command.removeprefix(".venv/bin/") for line in told for command in line.split(" && ")]
    assert told == re.findall(r"\t\$\(BIN\)/(.+)", recipe)


def test_each_of_the_ten_questions_leads_to_files_that_say_so_in_their_first_line() -> None:
    rows = re.findall(r"^\| (.+\?) \| (`.+`) \|$", CONTRIBUTING, re.MULTILINE)
    assert len(rows) == 10 == len({question for question, _ in rows})
    for _, named in rows:
        for name in re.findall(r"`(.+?)`", named):
            assert re.match('r?"""', (ROOT / name).read_text()), f"{name} has no docstring"


def test_hooks_need_no_network_and_call_programs_that_an_extra_installs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    extras = (ROOT / "pyproject.toml").read_text()
    for hook in hooks:
        program, *arguments = hook["entry"].split()
        if program.startswith(".venv/bin/"):
            assert f'"{Path(program).name}>=' in extras
        else:
            assert program == "python3"
            assert (ROOT / arguments[0]).exists()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_least_rights_and_calls_targets_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    makefile = (ROOT / "Makefile").read_text()
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@(v\d+|[0-9a-f]{40})", step["uses"])
            for target in re.findall(r"^(?:sudo )?make (\w+)", step.get("run", ""), re.MULTILINE):
                assert f"\n{target}:" in makefile


def test_workflows_run_the_checks_on_both_versions_of_python() -> None:
    assert [path.name for path in WORKFLOWS] == ["checks.yaml", "docs.yaml", "nightly.yaml"]
    checks = yaml.safe_load(WORKFLOWS[0].read_text())
    assert checks["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert checks["jobs"]["lint"]["steps"][-1]["run"].count(".venv/bin/") == 4


def test_issue_forms_ask_for_version_and_command() -> None:
    forms = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yaml")}
    assert set(forms) == {"bug.yaml", "config.yaml", "result.yaml", "wish.yaml"}
    for name in ("bug.yaml", "result.yaml", "wish.yaml"):
        form = forms[name]
        assert form["name"] and form["description"]
        identifiers = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(identifiers) == len(set(identifiers)) >= 2
    assert {"version", "command", "output"} <= {field.get("id") for field in forms["bug.yaml"]["body"]}


def test_a_module_is_mutated_place_by_place_and_messages_are_left() -> None:
    source = '"""Say 1."""\ndef f(x: int = 2) -> bool:\n    if x < 0:\n        raise ValueError(f"{x} < 0")\n    return not x == 3\n'
    found = [(mutant.line, mutant.before, mutant.after) for mutant in mutants_of(source)]
    assert found == [
        (2, "2", "3"),
        (3, "x < 0", "x <= 0"),
        (3, "0", "1"),
        (5, "not x == 3", "not not x == 3"),
        (5, "x == 3", "x != 3"),
        (5, "3", "4"),
    ]
