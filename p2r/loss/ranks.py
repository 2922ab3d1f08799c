"""Communication and validation for losses over the rows of all ranks.

`group=None` means the default process group if torch.distributed is initialised, and a single process otherwise.

Nothing here is differentiable: each loss computes the gradient of its own rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from p2r.device import is_waited_for
from p2r.errors import EmbeddingError

GradientScale = Literal["mean", "sum"]
"""Reduction of gradients over ranks: DDP and ZeRO average (`mean`), a plain all-reduce adds (`sum`)."""

_MAX_MESSAGE_BYTES = 400
_MAX_NUMBERS = 16


class Findings:
    """Violations counted on the device, without synchronising until the counts are read.

    For training steps with constant shapes, on ranks that run the same code. A loss with findings assumes that all ranks pass
    equal arguments and the same number of rows. On a CPU, where reading values is free, it checks and raises immediately.
    Non-finite values are counted on a CPU, too: the caller may skip the step and continue.
    """

    def __init__(self) -> None:
        self._found: list[tuple[str, Tensor, bool]] = []

    def add(self, message: str, count: Tensor, *, may_pass: bool = False) -> None:
        """Record the number of violations of a rule.

        Args:
            message: Message with the placeholder `{count}`.
            count: Number of violations, a scalar on the device.
            may_pass: The loss is then not finite, and the caller may skip the step and continue.
        """
        self._found.append((message, count, may_pass))

    def counts(self) -> list[Tensor]:
        """Return the counts, scalars on their device, in the same order on every rank."""
        return [count for _, count, _ in self._found]

    def broken(self, counts: Sequence[int]) -> str | None:
        """Return the message of the first violated rule, given the values of the counts; None if no rule is violated."""
        return next(
            (message.format(count=count) for (message, *_), count in zip(self._found, counts, strict=True) if count),
            None,
        )

    def refuse(self, counts: Sequence[int], *, may_pass: bool = False) -> None:
        """Raise EmbeddingError for the first violated rule.

        Args:
            counts: Values of `counts()`.
            may_pass: Ignore violations for which a step may be skipped.
        """
        for (message, _, passes), count in zip(self._found, counts, strict=True):
            if count and not (passes and may_pass):
                raise EmbeddingError(message.format(count=count))


def postpones(findings: Findings | None, *values: Tensor) -> TypeGuard[Findings]:
    """Return whether checks of these values are postponed: there are findings, and reading the values would synchronise."""
    return findings is not None and any(is_waited_for(value.device) for value in values)


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in the group and the group's size; (0, 1) without a group."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def own_gradient_factor(gradient_scale: GradientScale, group: ProcessGroup | None) -> float:
    """Return the factor for a rank's own part of the gradient, such that the reducer gives the full gradient."""
    if gradient_scale not in ("mean", "sum"):
        raise ValueError(f"gradient_scale must be 'mean' or 'sum', got {gradient_scale!r}")
    return float(rank_and_size(group)[1]) if gradient_scale == "mean" else 1.0


def agree(
    problem: ValueError | None,
    num_rows: int,
    equal: Mapping[str, float],
    *,
    device: torch.device,
    group: ProcessGroup | None,
) -> list[int]:
    """Exchange the number of rows of each rank, or raise the same error on all ranks.

    If only one rank raised, the others would wait for it forever. So every check of a loss precedes its first exchange, and
    its result is passed here.

    Args:
        problem: Error in this rank's arguments; None if there is none.
        num_rows: This rank's number of rows.
        equal: Numbers that must be equal on every rank, by name; ignored if there is a problem.
        device: Device from which the group can send.
        group: The ranks.

    Returns:
        Number of rows by rank.

    Raises:
        ValueError: on every rank, with the problem of the first rank that has one, or the number that differs.
    """
    if rank_and_size(group)[1] == 1:
        if problem is not None:
            raise problem
        return [num_rows]
    kind = 0 if problem is None else 2 if isinstance(problem, EmbeddingError) else 1
    values = [*equal.values()][:_MAX_NUMBERS]
    own = torch.tensor([kind, num_rows, *values, *[0] * (_MAX_NUMBERS - len(values))], dtype=torch.float64)
    facts = torch.stack(_gather_equal(own.to(device), group)).tolist()
    if any(row[0] for row in facts):
        text = str(problem or "").encode()[:_MAX_MESSAGE_BYTES].ljust(_MAX_MESSAGE_BYTES, b"\0")
        texts = _gather_equal(torch.tensor(list(text), dtype=torch.uint8, device=device), group)
        rank = next(rank for rank, row in enumerate(facts) if row[0])
        message = f"rank {rank}: {bytes(texts[rank].tolist()).rstrip(bytes(1)).decode(errors='replace')}"
        raise EmbeddingError(message) if facts[rank][0] == 2 else ValueError(message)
    for column, name in enumerate(equal, start=2):
        by_rank = [row[column] for row in facts]
        if any(value != by_rank[0] for value in by_rank):
            raise ValueError(f"{name} must be the same on every rank, got by rank {by_rank}")
    return [int(row[1]) for row in facts]


def refuse_pair(**towers: Tensor) -> None:
    """Raise ValueError unless both embeddings are (n, E) of one floating dtype on one device."""
    (one_name, one), (other_name, other) = towers.items()
    both = f"{one_name} and {other_name}"
    if one.ndim != 2 or one.shape != other.shape:
        raise ValueError(f"expected {both} of one shape (n, E), got {tuple(one.shape)} and {tuple(other.shape)}")
    if one.dtype != other.dtype or not one.dtype.is_floating_point:
        raise ValueError(f"expected {both} of one floating dtype, got {one.dtype} and {other.dtype}")
    if one.device != other.device:
        raise ValueError(f"expected {both} on one device, got {one.device} and {other.device}")


def refuse_weights(weights: Tensor, rows: Tensor, findings: Findings | None) -> None:
    """Raise ValueError unless each row has one finite, non-negative weight, on the same device."""
    if weights.shape != (len(rows),) or weights.device != rows.device:
        raise ValueError(
            f"expected weights ({len(rows)},) on {rows.device}, got {tuple(weights.shape)} on {weights.device}"
        )
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if postpones(findings, weights):
        findings.add("{count} weights are negative or not finite", bad.sum())
    elif bad.any():
        raise ValueError("weights must be finite and not negative")


def refuse_values(*, findings: Findings | None, zeros: bool = False, **towers: Tensor) -> None:
    """Raise EmbeddingError for embeddings that are not finite or, unless `zeros`, all zeros.

    This synchronises with the device once, or not at all if there are findings to add to.
    """
    found = Findings()
    for name, rows in towers.items():
        values = rows.detach()
        message = f"{name}: {{count}} of {len(rows)} embeddings are not finite"
        # One bad step may give non-finite embeddings, so it may be skipped; zeros mean that the network has collapsed.
        (found if findings is None else findings).add(message, (~torch.isfinite(values)).any(1).sum(), may_pass=True)
        if not zeros:
            message = f"{name}: {{count}} of {len(rows)} embeddings are all zeros, without a direction"
            (findings if postpones(findings, rows) else found).add(message, (values == 0).all(1).sum())
    if counts := found.counts():
        found.refuse(torch.stack(counts).tolist())


def all_gather_rows(rows: Tensor, counts: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks, in the order of ranks.

    Args:
        rows: (n, ...) rows of this rank.
        counts: n of each rank.
        group: The ranks.
    """
    if len(counts) == 1:
        return rows
    longest = max(counts)
    padded = rows if len(rows) == longest else torch.cat((rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])))
    parts = _gather_equal(padded, group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def own_columns(
    partial_sums: Tensor, counts: Sequence[int], panels: Sequence[int], group: ProcessGroup | None
) -> Tensor:
    """Sum all ranks' partial sums of this rank's columns, always in the same order.

    Args:
        partial_sums: (P, N) partial sums of this rank.
        counts: Number of columns of each rank, N in total.
        panels: P of each rank, computed from `counts`: exchanging it would synchronise with the device.
        group: The ranks.

    Returns:
        (n,) sums of this rank's n columns.
    """
    rank, size = rank_and_size(group)
    received = [partial_sums]
    if size > 1:
        assert len(partial_sums) == panels[rank]
        sent = [part.contiguous() for part in torch.split(partial_sums, list(counts), dim=1)]
        received = [partial_sums.new_empty(num_panels, counts[rank]) for num_panels in panels]
        flat = partial_sums.new_empty(sum(part.numel() for part in received))
        dist.all_to_all_single(
            flat,
            torch.cat([part.flatten() for part in sent]),
            [part.numel() for part in received],
            [part.numel() for part in sent],
            group=group,
        )
        sizes = [part.numel() for part in received]
        received = [
            part.view(num_panels, counts[rank])
            for part, num_panels in zip(torch.split(flat, sizes), panels, strict=True)
        ]
    total = partial_sums.new_zeros(counts[rank])
    for part in received:
        for panel in part:
            total += panel
    return total


def circulate(
    own: Sequence[Tensor], counts: Sequence[int], group: ProcessGroup | None
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield the tensors of every rank in turn, own first, passing them around the ring.

    A rank holds its own tensors and those of at most two other ranks: one in use, one arriving.

    Args:
        own: Tensors (n, ...) of this rank.
        counts: n of each rank.
        group: The ranks.

    Yields:
        The source rank, and its tensors.
    """
    rank, size = rank_and_size(group)
    here = [tensor.contiguous() for tensor in own]
    for turn in range(size):
        source = (rank - turn) % size
        arriving: list[Tensor] = []
        requests = []
        if turn < size - 1:
            coming = counts[(source - 1) % size]
            arriving = [tensor.new_empty(coming, *tensor.shape[1:]) for tensor in here]
            to, come_from = ((rank + 1) % size, (rank - 1) % size)
            if group is not None:
                to, come_from = dist.get_global_rank(group, to), dist.get_global_rank(group, come_from)
            transfers = [dist.P2POp(dist.isend, tensor, to, group) for tensor in here if tensor.numel()]
            transfers += [dist.P2POp(dist.irecv, tensor, come_from, group) for tensor in arriving if tensor.numel()]
            requests = dist.batch_isend_irecv(transfers) if transfers else []
        yield source, here
        for request in requests:
            request.wait()
        here = arriving


def all_reduce_sum(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum the tensors of all ranks into a new tensor."""
    total = value.clone()
    if rank_and_size(group)[1] > 1:
        dist.all_reduce(total, group=group)
    return total


def _gather_equal(value: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(rank_and_size(group)[1])]
    dist.all_gather(parts, value.contiguous(), group=group)
    return parts
