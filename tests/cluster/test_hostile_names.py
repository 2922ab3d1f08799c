"""A job whose names all are attacks, from its scans to the pages in a browser: each name stays text, and no file is written elsewhere."""

import csv
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import p2r.__main__ as one_process
from cluster.status_reader import Reader
from cluster.status_server import Feed, StatusServer
from p2r.storage import Storage
from tests.browser import Browser
from tests.conftest import TOY_JOB
from tests.ray_head import MARK, MARKED, environment, head, jobs_of, leaks, watched_commands
from tests.ray_head import p2r as p2r_process
from tests.toy import write_toy_data

P2R = Callable[..., tuple[int, str]]

NAME = "=cmd|x\x1b]0;own\x07\u202e\x9b31m\u200b\nforged: line\r<img src=x onerror=alert(1)..%2f..%2f&`$(id)`"
"""Name of folders and files: a formula, commands to a terminal, direction marks, a forged line, HTML, a path, a command line."""
TEXT = f"{NAME}></td></script><script>alert(2)</script>"
URL_NAME = re.sub("[\x00-\x1f\x7f-\x9f]", "", NAME) + "#1?x=1"
"""Name of the storage: without control characters, which a URL cannot hold."""


def write_job(folder: Path) -> Path:
    data = folder / NAME
    write_toy_data(data)
    for path in [*data.glob("images/*"), *data.glob("labels/*")]:
        path.rename(path.with_name(path.name.replace("_T1w", f"_{NAME}_T1w")))
    task = yaml.safe_load((data / "task.yaml").read_text())
    task |= {"classes": {1: TEXT}, "title": TEXT, "citation": TEXT, "caveat": TEXT, "cohort": NAME}
    task["strata"] = {NAME: ["sub-[01-08]"]}
    (data / "task.yaml").write_text(yaml.safe_dump(task))
    job: dict[str, Any] = yaml.safe_load(TOY_JOB.format(data="DATA", num_workers=1))
    job["storage"] = str(folder / URL_NAME)
    job["ingest"] |= {
        "sources": [f"{data}/images"], "provenance": TEXT, "cohort": NAME,
        "subjects_of": {"task": f"{data}/task.yaml", "split": "train"},
    }  # fmt: skip
    job["pretrain"]["steps"] = 2
    job["publish"]["description"] = TEXT
    job["finetune"] |= {"tasks": [f"{data}/task.yaml"], "num_labelled": [1], "steps": 2, "modes": ["fine_tune"]}
    path = data / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("hostile"))


def assert_harmless(said: str) -> None:
    assert said.replace("\n", "").isprintable(), ascii(said)
    assert not re.search("^forged", said, re.MULTILINE), "a forged line"
    assert "Traceback" not in said


def test_a_run_prints_text_and_writes_where_it_should(
    p2r: P2R, job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job.parent.parent
    monkeypatch.setattr(sys, "argv", ["p2r", str(job)])
    assert one_process.main() == 0
    printed = capsys.readouterr()
    assert_harmless(printed.out)
    assert_harmless(printed.err)
    assert sorted(path.name for path in folder.iterdir()) == sorted([NAME, URL_NAME])
    storage = folder / URL_NAME
    (row,) = json.loads((storage / "report/report.json").read_text())["rows"]
    assert list(row["dice"]) == [TEXT]
    for words in (["status", storage], ["inspect", storage / "corpus"], ["verify", storage / "backbones/toy/1"]):
        code, said = p2r(*words)
        assert code == 0, said
        assert_harmless(said)


def test_a_name_that_would_forge_lines_in_ray_s_logs_is_not_submitted(
    p2r: P2R, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray logs the command of a job as it is."""
    monkeypatch.chdir(job.parent)
    (job.parent / "plain.yaml").write_bytes(job.read_bytes())
    for words in ((job.name,), ("plain.yaml", "--set", "publish.description='a\n\nforged: line'")):
        code, said = p2r("submit", *words, "--address", "http://127.0.0.1:9")
        assert code == 2 and "cannot be submitted" in said, said
        assert_harmless(said)


@pytest.mark.ray
def test_run_on_this_machine_and_submit_to_a_head_print_text_and_leave_no_secret(tmp_path: Path, short: Path) -> None:
    """The submitted job finds the work of the first one done."""
    job = write_job(tmp_path)
    data = job.parent
    (data / "job.yaml").write_bytes(job.read_bytes())
    (short / "own").mkdir()
    with watched_commands() as commands:
        said = [p2r_process("run", job.name, env=environment(**MARKED, RAY_TMPDIR=str(short / "own")), cwd=data)]
        assert list(short.rglob("runtime_env_agent.log")) and list(short.rglob("raylet.out"))
        with head(short) as (_, dashboard):
            submitted = ("submit", "job.yaml", "--address", f"http://127.0.0.1:{dashboard}")
            said.append(p2r_process(*submitted, env=environment(**MARKED), cwd=data))
            jobs = jobs_of(dashboard)
    for text in said:
        assert_harmless(text.replace("\tINFO ", " INFO "))  # Ray's own
        assert "report | " in text or "page: " in text, text
    assert jobs.count('"entrypoint"') == 1 and "SUCCEEDED" in jobs
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([NAME, URL_NAME])
    assert Storage(str(tmp_path / URL_NAME / "corpus")).read_json("manifest.json")["num_records"] > 0
    (row,) = json.loads((tmp_path / URL_NAME / "report/report.json").read_text())["rows"]
    assert list(row["dice"]) == [TEXT]
    assert [*leaks(short), *leaks(tmp_path)] == []
    for text in (*said, jobs, *(command.decode(errors="replace") for command in commands)):
        assert MARK not in text


def test_segmentations_have_a_table_that_executes_nothing(p2r: P2R, job: Path, tmp_path: Path) -> None:
    model = job.parent.parent / URL_NAME / "models/disc/all"
    code, said = p2r("predict", model, job.parent / "images", "-o", tmp_path / "out")
    assert code == 0, said
    assert_harmless(said)
    with (tmp_path / "out/volumes.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert len(cells) == 9 * 3 and all(cell.isprintable() and not cell.startswith(tuple("=+-@")) for cell in cells)


@contextmanager
def status_page(storage: Path) -> Iterator[str]:
    server = StatusServer(Feed(Reader(storage.name, Storage(str(storage))), is_local=True), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,))
    thread.start()
    try:
        yield server.page_url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_no_name_becomes_an_element_of_a_page(tab: Browser, job: Path) -> None:
    storage = job.parent.parent / URL_NAME
    with status_page(storage) as url:
        for page in (url, storage / "report/report.html"):
            tab.open(page, width=1200, scheme="light")
            tab.value_of("new Promise(done => setTimeout(done, 1500))")
            assert tab.value_of("document.body.innerText").count("onerror=alert(1)") > 0, page
            assert tab.value_of("document.querySelectorAll('[onerror], [onload], img[src=x]').length") == 0
            scripts = tab.value_of("[...document.scripts].map(one => one.textContent)")
            assert not [script for script in scripts if "alert" in script]
            assert not [event for event in tab.events if event["method"] == "Page.javascriptDialogOpening"]
