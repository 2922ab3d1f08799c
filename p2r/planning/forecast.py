"""The result of a plan: memory, traffic, pace and cost of a pretraining job, as plain values."""

from dataclasses import asdict, dataclass
from typing import Any

from p2r.planning.roofline import LossTime
from p2r.planning.tune_batch import HEADROOM


@dataclass(frozen=True)
class Moment:
    """What a rank holds at one moment of a step, in bytes."""

    name: str
    weights: int = 0
    """What the network computes with."""
    optimizer: int = 0
    """Both moments of AdamW and, with ZeRO, the fp32 weights that it updates: this rank's part."""
    gradients: int = 0
    """With the buffers in which ranks reduce them."""
    activations: int = 0
    """What the forward pass keeps for the backward one."""
    working: int = 0
    """What else the moment makes: maps on their way through the network."""
    embeddings: int = 0
    """Of pixel pairs: this rank's and others', and what the loss makes of them."""
    batch: int = 0
    """Images, and the views made of them. Voxels as they were decoded, 2 bytes each, are left out."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))


@dataclass(frozen=True)
class Traffic:
    """What a rank must send in a step at least, in bytes."""

    gradients: int
    weights: int
    """What ZeRO gathers after the update."""
    embeddings: int
    """All ranks' rows, and the loss's sums over them."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.weights + self.embeddings


@dataclass(frozen=True)
class Rate:
    """Images a second of one worker, and where the number comes from."""

    images_per_s: float
    source: str


@dataclass(frozen=True)
class Pace:
    """How long it takes and what it costs, if all workers keep one worker's rate."""

    images_per_s: float
    """Of all workers."""
    source: str
    step_s: float
    network_mib_per_s: float
    """What a rank has to send in the time of a step."""
    storage_mib_per_s: float
    """What all workers read together."""
    run_hours: float
    epoch_hours: float | None
    """None: there is no corpus yet that could be passed over."""
    run_cost: float | None
    epoch_cost: float | None
    impossible: str | None
    """Why no worker can keep the rate, and the way out; None: nothing speaks against it."""


@dataclass(frozen=True)
class Plan:
    """What a job's pretraining comes to on so many workers."""

    num_nodes: int
    workers_per_node: int
    device: str
    global_batch: int
    images_per_worker: int
    micro_batch: int
    """Images encoded at once."""
    pixel_pairs: int
    """Of a step, over all workers: N."""
    negatives: str
    num_weights: int
    saved_bytes: int
    """What autograd keeps at most: of the network and, where they are there together, of the loss."""
    memory: tuple[Moment, ...]
    limit_bytes: int | None
    """What a worker may hold, if it is known."""
    traffic: Traffic
    bytes_per_image: float
    """That are read for an image."""
    images_in_corpus: int | None
    steps_per_epoch: float | None
    pace: Pace | None
    """None: no rate was measured or stated."""
    loss_time: LossTime | None
    """Of a worker and step; None where it is not known."""
    world_sizes: tuple[int, ...]
    """Numbers of workers that can share the global batch."""

    @property
    def num_workers(self) -> int:
        """W."""
        return self.num_nodes * self.workers_per_node

    @property
    def peak(self) -> Moment:
        """The worst moment."""
        return max(self.memory, key=lambda moment: moment.total)

    @property
    def fits(self) -> bool:
        """Whether the worst moment leaves the headroom free; True where no limit is known."""
        return self.limit_bytes is None or self.peak.total <= (1 - HEADROOM) * self.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        memory = {moment.name: {**asdict(moment), "total": moment.total} for moment in self.memory}
        for moment in memory.values():
            del moment["name"]
        traffic = {**asdict(self.traffic), "total": self.traffic.total}
        own = {"num_workers": self.num_workers, "memory_bytes": memory, "peak_bytes": self.peak.total}
        rest = {key: value for key, value in asdict(self).items() if key not in ("memory", "traffic")}
        return {**rest, **own, "traffic_bytes": traffic, "fits": self.fits}
