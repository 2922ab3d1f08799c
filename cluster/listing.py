"""`p2r list`: published versions as a table, one line per version, newest last."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from cluster.inspect import plain
from p2r.artefact_manifest import ModelManifest
from p2r.published.collection import Collection, Version, read_figures
from p2r.published.results import Result

_DIGITS = 12
_COLUMNS = ("version", "pointers", "published", "sha256", "MiB", "step", "health", "Dice [interval]")


def collections_table(collections: Sequence[Collection]) -> Table:
    """Return a table of all versions of some names."""
    table = Table(*_COLUMNS, box=None)
    for collection in collections:
        for version in collection.versions:
            table.add_row(*map(plain, _cells(collection, version)))
        for pointer, problem in collection.damaged_pointers.items():
            table.add_row(plain(f"{collection.name}@{pointer}"), plain("DAMAGED"), "", "", "", "", "", plain(problem))
        known = {version.version for version in collection.versions}
        for pointer, one in collection.pointers.items():
            if one.target.version not in known:
                table.add_row(
                    plain(f"{collection.name}@{pointer}"),
                    plain(f"names {one.target.version}, which is absent"),
                    *[""] * 6,
                )
    return table


def _cells(collection: Collection, version: Version) -> Iterator[str]:
    yield f"{collection.name}/{version.version}"
    yield ", ".join(collection.pointers_to(version))
    yield version.published[:16].replace("T", " ")
    artefact = version.artefact
    if artefact is None:
        yield from ("", "", "", "")
        yield version.problem or f"put out of use by p2r gc on {version.removed}"
        return
    yield artefact.sha256[:_DIGITS]
    yield f"{version.num_bytes / 2**20:.1f}"
    step = getattr(artefact.manifest, "step", None)
    yield "" if step is None else str(step)
    metrics, results, problems = read_figures(artefact)
    rank = (metrics.health or {}).get("effective_rank") if metrics is not None else None
    yield "" if rank is None else f"rank {rank:.1f}"
    if isinstance(artefact.manifest, ModelManifest):
        dice = (artefact.manifest.validation or {}).get("dice_mean")
        yield f"validation {dice:.3f}" if isinstance(dice, float) else ""
    else:
        yield "; ".join([*map(_result_text, _best_by_task(results)), *problems])


def _best_by_task(results: Sequence[Result]) -> list[Result]:
    """Return, for each task, the best result with the fewest labelled patients."""
    best: dict[str, Result] = {}
    for one in results:
        other = best.get(one.task)
        if other is None or (one.num_labelled, -one.mean) < (other.num_labelled, -other.mean):
            best[one.task] = one
    return list(best.values())


def _result_text(one: Result) -> str:
    interval = f"[{one.lower:.2f}, {one.upper:.2f}]"
    return f"{one.task} n={one.num_labelled} {one.mean:.2f} {interval} {one.mode}" + " transductive" * one.transductive
