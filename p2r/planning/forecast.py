"""Result of a plan: memory, traffic, pace and cost of a pretraining job, as plain values."""

from dataclasses import asdict, dataclass

from p2r.planning.roofline import LossTime
from p2r.planning.tune_batch import HEADROOM


@dataclass(frozen=True)
class Moment:
    """Memory of a rank at one moment of a step, bytes."""

    name: str
    weights: int = 0
    """Weights that the network computes with."""
    optimizer: int = 0
    """This rank's part of both moments of AdamW and, with ZeRO, of the fp32 weights that it updates."""
    gradients: int = 0
    """Gradients, and the buffers in which ranks reduce them."""
    activations: int = 0
    """Tensors that the forward pass saves for the backward pass."""
    working: int = 0
    """Temporaries: feature maps on their way through the network."""
    embeddings: int = 0
    """Embeddings of this rank's and other ranks' pixel pairs, and tensors that the loss derives from them."""
    batch: int = 0
    """Images and their views. Decoded voxels, 2 bytes each, are not included."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))


@dataclass(frozen=True)
class Traffic:
    """Minimum that a rank sends in a step, bytes."""

    gradients: int
    weights: int
    """Weights that ZeRO gathers after the update."""
    embeddings: int
    """Rows of all ranks, and the loss's sums over them."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.gradients + self.weights + self.embeddings


@dataclass(frozen=True)
class Rate:
    """Throughput of one worker, and the source of the number."""

    images_per_s: float
    source: str


@dataclass(frozen=True)
class Pace:
    """Duration and cost, if all workers keep one worker's throughput."""

    images_per_s: float
    """Throughput of all workers."""
    source: str
    step_s: float
    network_mib_per_s: float
    """Traffic of a rank during a step."""
    storage_mib_per_s: float
    """Reads of all workers together."""
    run_hours: float
    epoch_hours: float | None
    """None: the corpus does not exist yet."""
    run_cost: float | None
    epoch_cost: float | None
    impossible: str | None
    """Reason that no worker can keep the throughput, and the way out; None: no reason known."""


@dataclass(frozen=True)
class Plan:
    """Estimates for a job's pretraining on a given number of workers."""

    num_nodes: int
    workers_per_node: int
    device: str
    global_batch: int
    images_per_worker: int
    micro_batch: int
    """Images encoded at once."""
    pixel_pairs: int
    """Pixel pairs of a step over all workers, N."""
    negatives: str
    num_weights: int
    saved_bytes: int
    """Peak of the tensors that autograd saves for the network and, if they exist at the same time, for the loss."""
    memory: tuple[Moment, ...]
    limit_bytes: int | None
    """Memory that a worker may use; None: unknown."""
    traffic: Traffic
    bytes_per_image: float
    """Bytes read per image."""
    images_in_corpus: int | None
    steps_per_epoch: float | None
    pace: Pace | None
    """None: no throughput was measured or stated."""
    loss_time: LossTime | None
    """Time of the loss per worker and step; None: unknown."""
    loss_without_kernels: str | None
    """Reason that GPUs compute the loss without its kernels, many times slower, and the way out; None: not known."""
    world_sizes: tuple[int, ...]
    """Numbers of workers that can share the global batch."""

    @property
    def num_workers(self) -> int:
        """Number of workers, W."""
        return self.num_nodes * self.workers_per_node

    @property
    def peak(self) -> Moment:
        """Moment with the largest memory."""
        return max(self.memory, key=lambda moment: moment.total)

    @property
    def fits(self) -> bool:
        """True if the peak leaves the headroom free, or no limit is known."""
        return self.limit_bytes is None or self.peak.total <= (1 - HEADROOM) * self.limit_bytes

    def to_dict(self) -> dict[str, object]:
        """Return the plan as JSON values."""
        memory = {moment.name: {**asdict(moment), "total": moment.total} for moment in self.memory}
        for moment in memory.values():
            del moment["name"]
        traffic = {**asdict(self.traffic), "total": self.traffic.total}
        own = {"num_workers": self.num_workers, "memory_bytes": memory, "peak_bytes": self.peak.total}
        rest = {key: value for key, value in asdict(self).items() if key not in ("memory", "traffic")}
        return {**rest, **own, "traffic_bytes": traffic, "fits": self.fits}
