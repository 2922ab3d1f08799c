import subprocess
import sys
from pathlib import Path


def test_the_science_does_not_know_the_cluster_and_layers_point_one_way(repository: Path) -> None:
    # In a process of its own: import-linter switches off the loggers that it finds.
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_engine_runs_where_ray_is_not_installed(repository: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; sys.modules['prometheus_client'] = None; import p2r.__main__, p2r.backbone"
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, timeout=120)


def test_validating_a_job_imports_neither_torch_nor_ray(repository: Path) -> None:
    code = "import sys, cluster.cli; assert not {'torch', 'ray', 'deepspeed'} & set(sys.modules), 'slow imports'"
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, timeout=120)


def test_controller_and_channel_of_a_worker_group_import_no_torch_and_start_no_needless_actors(
    repository: Path,
) -> None:
    code = (
        "import sys; from cluster.group import TorchGroup, Trainer, DriverChannel; DriverChannel();"
        "trainer = Trainer(lambda: None, backend_config=TorchGroup(backend='gloo', timeout_s=60));"
        "assert not {'torch', 'deepspeed'} & set(sys.modules), 'slow imports';"
        "print(*(type(callback).__name__ for callback in trainer._create_default_callbacks()))"
    )
    asked = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=120)
    assert asked.returncode == 0, asked.stderr
    assert "BackendSetupCallback" in asked.stdout
    assert not {"DatasetsCallback", "PlacementGroupCleanerCallback"} & set(asked.stdout.split())


def test_no_file_is_named_after_nothing(repository: Path) -> None:
    names = {path.stem for folder in ("p2r", "cluster") for path in (repository / folder).rglob("*.py")}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}
