"""Real jobs with marked secrets: whatever Ray, the storage, the reports and the terminal keep of them is searched for the marks.

A whole job on one machine is searched in `test_hostile_names.py`.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.session import (
    Credentials,
    _session_credentials,
    _share_secrets,
    credentials,
    forwarded_secrets,
    forwarded_settings,
    session,
)
from p2r.errors import masked_errors
from p2r.masking import is_secret_name
from p2r.storage import Storage
from tests.fake_hub import TOKEN, Repository, fake_hub
from tests.ray_head import MARK, MARKED, environment, head, jobs_of, leaks, p2r, watched_commands

pytestmark = pytest.mark.ray


def test_ray_tune_copies_no_secret_into_the_runtime_environment_of_a_trial() -> None:
    from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

    import cluster.finetune  # noqa: F401  # takes them out

    assert not ENV_VARS_TO_PROPAGATE & MARKED.keys() and not any(map(is_secret_name, ENV_VARS_TO_PROPAGATE))


def test_a_cluster_s_workers_get_the_driver_s_keys_in_memory_and_a_submitted_job_gets_none(
    write_toy_job: Callable[..., Path], tmp_path: Path, short: Path, s3_server: dict[str, str], s3_url: str
) -> None:
    job = write_toy_job(tmp_path)
    keys = {name: value for name, value in s3_server.items() if name.startswith("AWS_")}
    secret = keys["AWS_SECRET_ACCESS_KEY"]
    others = {name: value for name, value in MARKED.items() if name != "AWS_SESSION_TOKEN"}
    with watched_commands() as commands, head(short) as (address, dashboard):
        # The nodes have no identity: the corpus in the bucket was written with keys that the driver has handed over.
        said = p2r(
            *("run", str(job), "--address", address, "--set", "kind=ingest", "--set", f"storage={s3_url}"),
            *("--set", "ingest.pseudonyms=true"),
            env=environment(**{**others, **keys}),
            cwd=tmp_path,
        )
        assert Storage(f"{s3_url}/corpus").read_json("manifest.json")["num_records"] > 0
        said += p2r(
            *("submit", job.name, "--address", f"http://127.0.0.1:{dashboard}", "--set", "kind=ingest"),
            env=environment(**MARKED),
            cwd=tmp_path,
        )
        jobs = jobs_of(dashboard)
    assert "not passed on, because Ray stores them with the job: " + ", ".join(sorted(MARKED)) in said
    assert jobs.count('"entrypoint"') == 2
    assert [*leaks(short, secret), *leaks(tmp_path / "storage")] == []
    for text in (said, jobs, *(command.decode(errors="replace") for command in commands)):
        assert MARK not in text and secret not in text


def test_ray_s_logs_hold_no_secret_of_an_error(ray_cluster: None) -> None:
    """Ray Train writes the traceback of a worker that fails into its own log."""
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError

    from cluster.group import TorchGroup, Trainer

    with tempfile.TemporaryDirectory() as folder, pytest.raises(TrainingFailedError) as raised:
        Trainer(
            fails,
            backend_config=TorchGroup(backend="gloo", timeout_s=30),
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(storage_path=folder),
        ).fit()
    assert "***@127.0.0.1" in str(raised.value) and MARK not in str(raised.value)
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = [path for path in (session / "logs").rglob("*") if path.is_file()]
    assert any(b"***@127.0.0.1" in path.read_bytes() for path in logs), "Ray has logged nothing: the test shows nothing"
    assert leaks(session / "logs") == []


def test_a_worker_reads_a_private_repository_of_a_hub_with_the_driver_s_token(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install -e '.[hub]'")
    commit, url = "a" * 40, "hf://org/private"
    with fake_hub() as hub:
        hub.repositories["org/private"] = Repository(
            is_private=True, commits={commit: {"manifest.json": b'{"name": "private"}'}}, names={"main": commit}
        )
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        # As `session` does at the address of a cluster, whose nodes have no token.
        settings = {**forwarded_settings(), "HF_HUB_CACHE": str(tmp_path / "hub")}
        read = ray.remote(num_cpus=0)(reads).options(runtime_env={"env_vars": settings})
        _share_secrets(forwarded_secrets())
        try:
            with pytest.raises(ray.exceptions.RayTaskError, match="is private and the token is missing"):
                ray.get(read.remote(Credentials(), url))
            assert ray.get(read.remote(credentials(), url)) == "private"
        finally:
            _session_credentials.clear()
    session_folder = Path(ray._private.worker._global_node.get_session_dir_path())
    assert [*leaks(session_folder / "logs", TOKEN), *leaks(tmp_path, TOKEN)] == []


def reads(given: Credentials, url: str) -> str:
    given.take()
    return str(Storage(url).read_json("manifest.json")["name"])


def fails() -> None:
    with masked_errors():
        try:
            raise OSError(MARKED["AWS_ENDPOINT_URL"])
        except OSError as error:
            raise ValueError(f"cannot open {MARKED['P2R_SOURCE']}, {MARKED['AWS_ENDPOINT_URL']}") from error


def test_what_is_secret_and_what_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "HF_", "P2R_"))]:
        monkeypatch.delenv(name)
    settings = {"P2R_STORAGE": "s3://bucket/runs", "AWS_DEFAULT_REGION": "eu-central-1", "AWS_ROLE_ARN": "arn:x"}
    settings["HF_ENDPOINT"] = "https://hub.example"
    monkeypatch.setenv("HF_HOME", "/a/folder/of/this/machine")
    for name, value in {**MARKED, **settings}.items():
        monkeypatch.setenv(name, value)
    found: dict[str, Any] = forwarded_settings()
    assert {name: value for name, value in found.items() if name.startswith(("AWS_", "HF_", "P2R_"))} == {
        **settings,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    assert forwarded_secrets() == {name: value for name, value in MARKED.items() if name != "P2R_PSEUDONYM_KEY"}
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "AWS_EC2_METADATA_DISABLED" not in forwarded_settings(), "a machine's role could not be asked for"


def test_ray_reports_to_its_authors_only_if_told_to(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.usage.usage_lib import usage_stats_enabled

    for told, reports in ((None, False), ("0", False), ("1", True)):
        monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
        if told is not None:
            monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", told)
        with session():
            assert usage_stats_enabled() is reports
