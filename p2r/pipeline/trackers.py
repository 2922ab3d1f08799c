"""TensorBoard, MLflow and Weights & Biases behind one small interface. Each is imported only if a job asks for it.

An adapter is opened with the identifier that it returned before, and continues that run. Addresses and credentials come from the
tools' own environment variables (MLFLOW_TRACKING_URI, WANDB_API_KEY, WANDB_MODE); without them MLflow writes below a local storage.
"""

import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from p2r.errors import InputError, how_to_install
from p2r.storage import Storage

_MAX_PARAMETERS = 200
_MAX_VALUE = 250


class Target(NamedTuple):
    """Place of a tracked run."""

    job: str
    """Name of the job: the experiment or project."""
    storage: Storage
    """Storage of the job."""
    run: str | None
    """Identifier of the run to continue; None: a new one."""
    variant: str | None = None
    """Variant of an ablation, which has a run of its own; None: the whole job."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.variant or self.job


class Tracker(Protocol):
    """A run in a tracker. Any method may raise anything: the caller switches the tracker off."""

    run: str
    """Identifier with which the run is continued."""
    sends_on_close: bool
    """True if the tool has nothing before `close` succeeds."""

    def parameters(self, values: Mapping[str, str]) -> None:
        """Record the settings of the job."""

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Record numbers at a step."""

    def picture(self, name: str, png: bytes) -> None:
        """Record a picture."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table."""

    def close(self, *, is_done: bool) -> None:
        """Write everything, and end the run if the job is done."""


class _TensorBoard:
    """Event files in `<storage>/tensorboard`, or `<storage>/tensorboard/<variant>`; for a bucket they are written locally and uploaded at
    the end of a call."""

    def __init__(self, target: Target) -> None:
        from tensorboardX import SummaryWriter

        self.run = "tensorboard" if target.variant is None else f"tensorboard/{target.variant}"
        self._storage, self.sends_on_close = target.storage, not target.storage.is_local
        self._folder = None if target.storage.is_local else tempfile.TemporaryDirectory(prefix="p2r-tensorboard-")
        where = self._folder.name if self._folder else target.storage.at(self.run).removeprefix("file://")
        self._where = Path(where)
        self._writer = SummaryWriter(str(where), flush_secs=10)

    def parameters(self, values: Mapping[str, str]) -> None:
        self._writer.add_text("job", markdown(("setting", "value"), list(values.items())), 0)

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, png: bytes) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(io.BytesIO(png)) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), 0, dataformats="HWC")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._writer.add_text(name, markdown(columns, rows), 0)

    def close(self, *, is_done: bool) -> None:
        self._writer.close()
        if self._folder is not None:
            with self._folder:
                for path in self._where.iterdir():
                    self._storage.upload(path, f"{self.run}/{path.name}")


class _MLflow:
    sends_on_close = False

    def __init__(self, target: Target) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            if not target.storage.is_local:
                raise InputError("mlflow needs MLFLOW_TRACKING_URI, because the job's storage is a bucket")
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for it
            uri = target.storage.at("mlflow")
        self._client, self._metric, self._now = MlflowClient(tracking_uri=uri), Metric, get_current_time_millis
        if target.run is None:
            experiment = self._client.get_experiment_by_name(target.job)
            number = experiment.experiment_id if experiment else self._client.create_experiment(target.job)
            self.run = str(self._client.create_run(number, run_name=target.name).info.run_id)
        else:
            self.run = target.run
            self._client.update_run(self.run, status="RUNNING")

    def parameters(self, values: Mapping[str, str]) -> None:
        known = self._client.get_run(self.run).data.params
        for name, value in values.items():
            if name not in known:  # parameters of a run never change
                self._client.log_param(self.run, name, value)

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        now = self._now()
        self._client.log_batch(
            self.run, metrics=[self._metric(name, value, now, step) for name, value in values.items()]
        )

    def picture(self, name: str, png: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="p2r-mlflow-") as folder:
            path = Path(folder, f"{name.replace('/', '-')}.png")
            path.write_bytes(png)
            self._client.log_artifact(self.run, str(path), "pictures")

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._client.log_text(self.run, markdown(columns, rows), f"{name}.md")

    def close(self, *, is_done: bool) -> None:
        self._client.set_terminated(self.run, status="FINISHED" if is_done else "KILLED")


class _WandB:
    sends_on_close = False

    def __init__(self, target: Target) -> None:
        import wandb

        self._wandb = wandb
        folder = tempfile.gettempdir() if not target.storage.is_local else target.storage.url.removeprefix("file://")
        self._run = wandb.init(
            project=target.job,
            name=target.name,
            group=target.job if target.variant else None,
            id=target.run,
            resume="allow",
            reinit="create_new",  # the runs of an ablation's variants are open at the same time
            dir=folder,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=30),
        )
        self.run = str(self._run.id)
        self._run.define_metric("pretrain/*", step_metric="pretrain/step")

    def parameters(self, values: Mapping[str, str]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        stage = next(iter(values)).partition("/")[0]
        self._run.log({**values, f"{stage}/step": step})

    def picture(self, name: str, png: bytes) -> None:
        from PIL import Image

        with Image.open(io.BytesIO(png)) as image:
            self._run.log({name: self._wandb.Image(image.convert("RGB"))})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def close(self, *, is_done: bool) -> None:
        self._run.finish(exit_code=0)


TRACKERS: dict[str, tuple[str, Callable[[Target], Tracker]]] = {
    "tensorboard": ("tensorboardX", _TensorBoard),
    "mlflow": ("mlflow", _MLflow),
    "wandb": ("wandb", _WandB),
}
"""Name in a job -> package, and the class of its runs."""


def check_packages(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        InputError: Names the package and the command that installs it.
    """
    missing = [TRACKERS[name][0] for name in names if find_spec(TRACKERS[name][0]) is None]
    if missing:
        raise InputError(
            f"trackers: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: {how_to_install('trackers')}, "
            "or leave the tracker out"
        )


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def flat_parameters(value: Any, key: str = "") -> dict[str, str]:
    """Return the settings of a job by dotted keys, as short texts; paths and URLs are left out by the caller."""
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for name, child in value.items():
            found |= flat_parameters(child, f"{key}.{name}" if key else str(name))
        return dict(list(found.items())[:_MAX_PARAMETERS])
    return {} if value is None else {key: str(value)[:_MAX_VALUE]}
