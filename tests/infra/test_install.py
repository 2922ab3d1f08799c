"""Installation as the README describes it: dependencies resolve on a plain machine, the lock fits the pins, a wheel is whole."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from cluster.status import target_of
from infra.supply_chain import PINS, all_pins, read_pins
from p2r.job import find_job, read_job
from tests.publishing import publish_toy

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()
KEPT = {"p2r", "cluster", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
NETWORK = re.compile(r"_proxy$|^SSL_CERT_|^(PATH|HOME|TMPDIR|UV_CACHE_DIR)$", re.IGNORECASE)


def planned(*arguments: str) -> str:
    """Return what make would run on a machine that has nothing yet, whatever it was that called these tests."""
    command = ["make", "-n", "-B", *arguments, "VENV=.no-such-environment"]
    environment = {name: value for name, value in os.environ.items() if not re.match(r"MAKE|MFLAGS|LOCKED", name)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def installs_of(*arguments: str) -> list[list[str]]:
    """Return the arguments of every `pip install` that make would run."""
    return [shlex.split(words) for words in re.findall(r"-m pip install (.*)", planned(*arguments))]


def resolve(
    arguments: list[str], *, python: str, platform: str = "x86_64-unknown-linux-gnu", wheels: Path | None = None
) -> dict[str, str]:
    """Resolve what pip is asked for, from the index and a folder of `wheels`: version by name; skip where no index answers."""
    uv = Path(sys.executable).parent / "uv"
    if not uv.exists():
        pytest.skip("no uv: pip install uv")
    (asked,) = (word for word in arguments if word.startswith("."))
    extras = asked.removeprefix(".").strip("[]").split(",")
    command = [str(uv), "pip", "compile", "--no-config", "--no-header", "--no-annotate", "--python", sys.executable]
    command += ["--python-version", python, "--python-platform", platform, "pyproject.toml"]
    command += [word for name in extras for word in ("--extra", name)]
    command += [word for word in arguments if word == "-c" or word.endswith(".txt")]
    command += [] if wheels is None else ["--find-links", str(wheels)]
    # No wheel of this machine, no other index of this machine: what anybody gets.
    environment = {name: value for name, value in os.environ.items() if NETWORK.search(name)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode != 0 and re.search(r"Failed to fetch|client error \(Connect\)", done.stderr):
        pytest.skip(f"no package index answers: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))


def pinned(name: str) -> str:
    """Return the version that a package is pinned to."""
    return all_pins()[name][1]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_what_make_installs_resolves_on_a_plain_linux_machine(python: str) -> None:
    (demo,) = installs_of("demo")
    (_, tests) = installs_of("test")
    for arguments in (demo, tests):
        found = resolve(arguments, python=python)
        assert (found["torch"], found["triton"]) == (pinned("torch"), pinned("triton"))
        assert "nvidia-nccl-cu13" in found, "torch is built for CUDA there"


def test_it_resolves_on_arm_too() -> None:
    (demo,) = installs_of("demo")
    assert "ray" in resolve(demo, python="3.12", platform="aarch64-unknown-linux-gnu")


def test_it_resolves_where_torch_is_built_for_cpus(tmp_path: Path) -> None:
    """It brings neither CUDA nor Triton; users need none, and tests install the one that other machines have."""
    version = f"{pinned('torch')}+cpu"
    with zipfile.ZipFile(tmp_path / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"torch-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        wheel.writestr(
            f"torch-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"torch-{version}.dist-info/RECORD", "")
    (demo,) = installs_of("demo")
    (_, tests) = installs_of("test")
    found = resolve(demo, python="3.11", wheels=tmp_path)
    assert found["torch"] == version
    assert not [name for name in found if name.startswith(("nvidia-", "cuda-", "triton"))]
    found = resolve(tests, python="3.11", wheels=tmp_path)
    assert (found["torch"], found["triton"]) == (version, pinned("triton"))


def test_make_installs_the_cluster_and_make_test_what_tests_need() -> None:
    assert installs_of("demo") == [["--no-compile", "-c", "constraints.txt", "-e", ".[cluster]"]]
    assert installs_of("test")[1][-1] == ".[tests]"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["tests"][0] == "p2r[cluster]"


def test_users_pins_leave_torch_its_own_cuda_and_triton() -> None:
    names = read_pins((ROOT / PINS[0]).read_text()).keys()
    assert not {name for name in names if re.match(r"nvidia|cuda|triton", name)}


def locked() -> dict[str, str]:
    """Return the version of every package in the lock file, by canonical name."""
    return {canonicalize_name(name): pin for name, pin in re.findall(r"^([\w.-]+)==([^\s;]+)", LOCK, re.MULTILINE)}


def test_the_lock_file_has_the_pins_and_what_the_platform_adds() -> None:
    pins = {name: version for name, (_, version) in read_pins((ROOT / PINS[0]).read_text()).items()}
    added = {name: version for name, version in locked().items() if name not in pins}
    assert {name: version for name, version in locked().items() if name in pins} == pins, "run: make lock"
    others = {name for name in added if not re.match(r"nvidia-|cuda-", name)}
    assert others == {"setuptools", "triton", "colorama", "tzdata"}, "run: make lock"


def test_every_package_of_the_lock_file_is_locked_by_hash_and_names_no_index() -> None:
    for entry in re.split(r"\n(?=\w)", LOCK.split("make lock\n")[1]):
        assert re.fullmatch(r"[\w.-]+==\S+(?: ; [^\\]+)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n?", entry), entry
    assert "://" not in LOCK and "--index" not in LOCK and "--find-links" not in LOCK


def test_a_locked_installation_takes_nothing_without_its_hash() -> None:
    words = planned("install", "LOCKED=1")
    assert "-m venv --clear" in words, "what was installed before is not checked"
    build, everything, own = installs_of("install", "LOCKED=1")
    assert {"--require-hashes", ".no-such-environment/build.lock"} < set(build)
    assert {"--require-hashes", "--no-build-isolation", "requirements.lock"} < set(everything), (
        "build tools have hashes, too"
    )
    assert {"--no-deps", "--no-build-isolation", "."} < set(own)
    # setuptools, which builds the rest, is found in the lock file.
    program = re.search(r"awk '(.*?)'", words)[1]  # type: ignore[index]
    done = subprocess.run(["awk", program, "requirements.lock"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("setuptools==") and done.stdout.count("==") == 1 and "--hash=sha256:" in done.stdout


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a program and return its stdout; without the path of this repository, which would be found first."""
    known = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "P2R_COMMIT", "P2R_STORAGE")
    }
    done = subprocess.run(command, cwd=cwd, env=known | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, folder: Path) -> Path:
    """Build a wheel of `source` as `make wheel` does, without the network, and return the folder of its content."""
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    shutil.unpack_archive(built, folder / "site", "zip")
    return folder / "site"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with this working tree as its only commit."""
    clone = tmp_path_factory.mktemp("clone")
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    for words in ("init", "add .", "-c user.name=p2r -c user.email=p2r@example.org commit -m x"):
        run("git", *words.split(), cwd=clone)
    return clone


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An unpacked wheel, and the commit that it is of."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is older than what builds p2r")
    site = build(clone, tmp_path_factory.mktemp("wheel"))
    assert run("git", "status", "--porcelain", cwd=clone) == "", "building makes nothing that git sees"
    return site, run("git", "rev-parse", "--short=12", "HEAD", cwd=clone).strip()


def test_a_wheel_knows_its_commit_also_in_somebody_else_s_repository(wheel: tuple[Path, str], tmp_path: Path) -> None:
    site, commit = wheel
    run("git", "init", cwd=site)
    code = "from p2r.version import code_version; import p2r; print(code_version(), p2r.__file__)"
    found, file = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert (found, Path(file)) == (commit, site / "p2r/__init__.py")
    assert (site / "p2r/py.typed").exists() and (site / "cluster/py.typed").exists()


def test_a_source_archive_makes_the_same_wheel(clone: Path, wheel: tuple[Path, str], tmp_path: Path) -> None:
    backend = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    archive = run(sys.executable, "-c", backend, tmp_path, cwd=clone).splitlines()[-1]
    with tarfile.open(tmp_path / archive) as tar:
        tar.extractall(tmp_path, filter="data")
    site = build(tmp_path / archive.removesuffix(".tar.gz"), tmp_path)

    def content(folder: Path) -> dict[str, bytes]:
        made = {".git", "__pycache__"}  # by other tests
        files = (path for path in folder.rglob("*") if path.is_file() and not made & set(path.parts))
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.name != "RECORD"}

    assert content(site) == content(wheel[0])


def test_a_wheel_brings_the_jobs_and_tasks_and_none_of_their_results(wheel: tuple[Path, str], tmp_path: Path) -> None:
    site, _ = wheel
    there = {path.relative_to(site / "p2r").as_posix() for path in (site / "p2r/jobs").rglob("*") if path.is_file()}
    expected = {*ROOT.glob("jobs/*.yaml"), *ROOT.glob("jobs/tasks/*.yaml"), ROOT / "jobs/job.schema.json"}
    assert there == {path.relative_to(ROOT).as_posix() for path in expected}
    names = [path.stem for path in ROOT.glob("jobs/*.yaml")]
    printed = run(
        sys.executable, "-m", "cluster", "validate", *names, "jobs/demo.yaml", cwd=tmp_path, PYTHONPATH=str(site)
    )
    assert len(re.findall(r"^valid ", printed, re.MULTILINE)) == len(names) + 1


def test_a_job_that_p2r_brings_gives_way_to_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo.yaml", "jobs/demo.yaml"):
        assert find_job(Path(name)) == ROOT / "jobs/demo.yaml"
    for name in ("mine/demo.yaml", "nothing", str(tmp_path / "demo.yaml")):
        assert find_job(Path(name)) == Path(name), "only a name, or a path of the README, means what p2r brings"
    assert target_of("demo")[0] == "demo"
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/demo.yaml").write_text("kind: pipeline\n")
    assert find_job(Path("jobs/demo.yaml")) == Path("jobs/demo.yaml")


EXTRA = [
    "ray",
    "deepspeed",
    "webdataset",
    "blosc2",
    "pydicom",
    "dcm2niix",
    "nilearn",
    "prometheus_client",
    "matplotlib",
]
CORE = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRA}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def run_core(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a module, or code after `-c`, as an installation without the extra `cluster` does."""
    first, *rest = map(str, words)
    code = rest.pop(0) if first == "-c" else f"runpy.run_module({first!r}, run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", CORE + code, *rest]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize("words", ["p2r.engine jobs/demo.yaml", "cluster run jobs/demo.yaml"])
def test_without_the_extra_a_job_says_what_to_install(words: str) -> None:
    done = run_core(*words.split())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "which is not installed here: install p2r again with its extra 'cluster'" in done.stderr


def test_without_the_extra_p2r_run_in_python_says_what_to_install() -> None:
    done = run_core("-c", "import p2r; p2r.load_backbone, p2r.load_model; p2r.run")
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: p2r.run needs the package")
    assert "install p2r again with its extra 'cluster'" in done.stderr


def test_without_the_extra_artefacts_are_inspected_and_verified(tmp_path: Path) -> None:
    url = publish_toy(str(tmp_path / "1"))["url"]
    for command in ("inspect", "verify"):
        done = run_core("cluster", command, url)
        assert done.returncode == 0 and "p2r-backbone/2" in done.stdout, done.stderr


def test_what_the_demo_leaves_does_not_hide_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python looks first in the folder in which it is started; `~/p2r` once was where jobs left what they made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("P2R_STORAGE", raising=False)
    storage = Path(read_job(ROOT / "jobs/demo.yaml").storage)
    assert storage == tmp_path / "p2r-runs/demo"
    # What an editable installation puts on the path, after the folder of the caller; no hook of another installation.
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); "
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in str(finder)]; "
        "import p2r; print(*p2r.__all__)"
    )
    for left in (storage, tmp_path / "p2r/demo"):  # now, and by earlier versions
        left.mkdir(parents=True)
        assert "load_backbone" in run(sys.executable, "-c", code, cwd=tmp_path)


def test_an_editable_installation_is_a_path_and_no_import_hook(tmp_path: Path) -> None:
    command = "import setuptools.build_meta as b, sys; print(b.build_editable(sys.argv[1]))"
    shutil.copytree(
        ROOT, tmp_path / "clone", ignore=lambda folder, names: set(names) - KEPT if folder == str(ROOT) else set()
    )
    built = run(sys.executable, "-c", command, tmp_path, cwd=tmp_path / "clone").splitlines()[-1]
    with zipfile.ZipFile(tmp_path / built) as content:
        names = [name for name in content.namelist() if "dist-info" not in name]
        assert names == ["__editable__.p2r-0.1.0.pth"]
        assert content.read(names[0]).decode().strip() == str(tmp_path / "clone")
