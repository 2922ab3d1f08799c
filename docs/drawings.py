"""The drawings of the explanation pages, as SVG that needs neither network nor fonts.

    python -m docs.drawings        # writes docs/images/*.svg

The batches in `order.svg` are computed by `p2r.data.order`; the other drawings are schematic. Colours follow the reader's
preference for light or dark.
"""

import math
from collections.abc import Callable
from pathlib import Path

from p2r.data.order import Order

IMAGES = Path(__file__).parent / "images"

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.small { font-size: 11px } .muted { fill: #59636e } .strong { font-weight: 600 } .middle { text-anchor: middle }
.line { stroke: #59636e; fill: none } .box { fill: #f6f8fa; stroke: #8c959f } .dark { fill: #ffffff }
.s0 { fill: #0072b2 } .s1 { fill: #b35a00 } .s2 { fill: #007a5a } .s3 { fill: #a3417f } .s4 { fill: #6b6b00 }
.warp { stroke: #0072b2; fill: none } .point { fill: #c2410c } .pale { opacity: 0.25 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .muted { fill: #9da7b3 } .line { stroke: #9da7b3 } .box { fill: #22272e; stroke: #768390 }
  .dark { fill: #ffffff } .warp { stroke: #56b4e9 } .point { fill: #fb923c }
  .s0 { fill: #1f78b4 } .s1 { fill: #b3651a } .s2 { fill: #15795c } .s3 { fill: #a04b82 } .s4 { fill: #747420 }
}
"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a drawing; `title` describes it to readers who cannot see it."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n"
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8" class="line"/></marker></defs>\n'
        f"{body}\n</svg>\n"
    )


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def _box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" class="{kind}"/>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:g} {y1:g} L{x2:g} {y2:g}" class="line" marker-end="url(#arrow)"/>'


def _bracket(x1: float, x2: float, y: float) -> str:
    return f'<path d="M{x1:g} {y - 5:g} V{y:g} H{x2:g} V{y - 5:g}" class="line"/>'


def draw_order() -> str:
    """Draw one epoch of a corpus of 5 shards and 24 samples in global batches of 4, as `Order` deals it."""
    counts, size = [6, 4, 5, 5, 4], 34
    order = Order([counts], seed=0, global_batch=4)
    (steps,) = order.steps_per_epoch
    parts = [_text(10, 20, "The corpus: five shards, 24 samples", "strong")]
    x = 10.0
    for shard, count in enumerate(counts):
        for sample in range(count):
            parts += _cell(x, 32, size - 6, shard, sample)
            x += size - 6
        parts.append(_text(x - count * (size - 6) / 2, 78, f"shard {shard}", "small muted middle"))
        x += 8
    parts.append(_text(10, 118, "One epoch: four lanes, a global batch of four per step", "strong"))
    for lane in range(order.num_lanes):
        parts.append(_text(150 + lane * 2 * size + size / 2, 140, f"lane {lane}", "small muted middle"))
    for step in range(steps):
        parts.append(_text(10, 168 + step * size, f"step {step}", "muted"))
        _, shards, samples = order.locate(order.samples(step).positions)
        for lane, (shard, sample) in enumerate(zip(shards, samples, strict=True)):
            parts += _cell(150 + lane * 2 * size, 148 + step * size, size - 4, int(shard), int(sample))
    bottom = 148 + steps * size + 8
    for row, ranks in enumerate((1, 2, 4)):
        y, lanes = bottom + row * 30, order.num_lanes // ranks
        parts.append(_text(10, y + 4, f"{ranks} rank{'s' * (ranks > 1)}", "muted"))
        for rank in range(ranks):
            left = 150 + rank * lanes * 2 * size
            right = left + (lanes - 1) * 2 * size + size - 4
            parts += [_bracket(left, right, y), _text((left + right) / 2, y + 15, f"rank {rank}", "small middle")]
    notes = [
        "Colour: the shard.",
        "Number: the sample in it.",
        "Every lane reads a stretch",
        "of one or two shards.",
        "The batch is the same",
        "for 1, 2 and 4 ranks.",
    ]
    parts += [_text(450, 168 + 22 * number, note, "muted") for number, note in enumerate(notes)]
    return svg(740, bottom + 90, "An epoch of the sample order: lanes, steps and ranks", parts)


def _cell(x: float, y: float, size: float, shard: int, sample: int) -> list[str]:
    return [
        _box(x, y, size - 2, size - 2, f"s{shard}"),
        _text(x + size / 2 - 1, y + size / 2 + 4, str(sample), "small dark middle"),
    ]


def draw_views() -> str:
    """Draw a grid in view a, its warped counterpart in view b, and three points of the same anatomy in both."""
    parts = [_text(110, 20, "view a", "strong middle"), _text(430, 20, "view b", "strong middle")]

    def warped(u: float, v: float) -> tuple[float, float]:
        angle, scale = math.radians(18), 0.86
        u2 = u + 0.05 * math.sin(5 * v)
        v2 = v + 0.05 * math.sin(4 * u)
        return (
            scale * (math.cos(angle) * u2 - math.sin(angle) * v2),
            scale * (math.sin(angle) * u2 + math.cos(angle) * v2),
        )

    def path(of: Callable[[float, float], tuple[float, float]], left: float, fixed: float, *, is_row: bool) -> str:
        places = [of(t / 10, fixed) if is_row else of(fixed, t / 10) for t in range(-10, 11)]
        words = " L".join(f"{left + 80 * u:.1f} {120 + 80 * v:.1f}" for u, v in places)
        return f'<path d="M{words}" class="warp"/>'

    for number in range(-2, 3):
        for is_row in (True, False):
            parts.append(path(lambda u, v: (u, v), 110, number / 2, is_row=is_row))
            parts.append(path(warped, 430, number / 2, is_row=is_row))
    parts += [_box(330, 30, 200, 180, "line"), _box(10, 30, 200, 180, "line")]
    for name, (u, v) in zip("123", [(-0.5, -0.5), (0.5, 0.0), (0.0, 0.5)], strict=True):
        for left, (x, y) in ((110, (u, v)), (430, warped(u, v))):
            parts.append(f'<circle cx="{left + 80 * x:.1f}" cy="{120 + 80 * y:.1f}" r="5" class="point"/>')
            parts.append(_text(left + 80 * x + 8, 120 + 80 * y - 6, name, "strong"))
    parts += [
        _arrow(325, 120, 216, 120),
        _text(270, 110, "warp", "middle"),
        _text(270, 140, "a pixel of b has", "small muted middle"),
        _text(270, 154, "a position in a", "small muted middle"),
        _text(110, 234, "own intensity draw", "small muted middle"),
        _text(430, 234, "warped, then its own intensity draw", "small muted middle"),
    ]
    return svg(560, 250, "Two views of one image and the warp between them", parts)


def draw_loss() -> str:
    """Draw the similarities of two ranks' pixel pairs: own rows against the candidates of all ranks, in tiles."""
    size, left, top = 22, 250, 60
    parts = [_text(left + 4 * size, 20, "keys of all ranks (candidates)", "strong middle")]
    for rank in range(2):
        y = top + rank * 4 * size
        parts += [
            _box(10, y + 6, 120, 4 * size - 12),
            _text(70, y + 40, f"rank {rank}", "strong middle"),
            _text(70, y + 58, "4 pixel pairs", "small muted middle"),
            _arrow(134, y + 2 * size, left - 62, y + 2 * size),
            _text(left - 56, y + 2 * size + 4, "queries", "small"),
            _text(left + (4 * rank + 2) * size, top - 12, f"of rank {rank}", "small muted middle"),
        ]
    for row in range(8):
        for column in range(8):
            kind = f"s{row // 4}" + ("" if row == column else " pale")
            parts.append(_box(left + column * size, top + row * size, size - 2, size - 2, kind))
    for line in (0, 4, 8):
        parts.append(f'<path d="M{left + line * size - 1} {top - 4} V{top + 8 * size + 3}" class="line"/>')
        parts.append(f'<path d="M{left - 4} {top + line * size - 1} H{left + 8 * size + 3}" class="line"/>')
    notes = [
        "dark: the positive of a query",
        "pale: its negatives",
        "one frame: one tile, computed, summed",
        "and dropped; computed again backwards",
        "colour: the rank that computes the row",
    ]
    parts += [_text(left + 8 * size + 20, top + 14 + 22 * number, note, "muted") for number, note in enumerate(notes)]
    parts.append(
        _text(10, top + 8 * size + 32, "Forward: ranks exchange embeddings and log-sums. Backward: no communication.")
    )
    return svg(710, 300, "The loss over the pixel pairs of two ranks", parts)


def draw_resume() -> str:
    """Draw a run that is killed after a checkpoint and continues on another number of ranks."""
    parts = [_text(10, 20, "A run that is killed at step 7 and resumed on four ranks", "strong")]
    for row, (name, start, end, ranks) in enumerate(
        [("before", 0, 8, 2), ("after", 5, 12, 4), ("uninterrupted", 0, 12, 1)]
    ):
        y = 50 + row * 62
        parts.append(_text(10, y + 18, name, "muted"))
        parts.append(_text(10, y + 34, f"{ranks} rank{'s' * (ranks > 1)}", "small muted"))
        for step in range(start, end):
            lost = row == 0 and step > 4
            parts.append(_box(110 + step * 48, y, 42, 30, f"s{step % 5}" + (" pale" if lost else "")))
            parts.append(_text(110 + step * 48 + 21, y + 19, str(step), "small dark middle"))
    parts += [
        _arrow(110 + 4 * 48 + 30, 84, 110 + 5 * 48 - 2, 122),
        _text(110, 128, "checkpoint after step 4: weights,", "small muted"),
        _text(110, 144, "optimizer, generators, position", "small muted"),
        _text(110 + 8 * 48 + 4, 70, "killed; steps 5 to 7 are repeated", "small muted"),
        _text(110, 236, "Equal colours: the same samples, the same views, the same points.", "muted"),
    ]
    return svg(720, 250, "A killed run resumes and gives the batches of an uninterrupted one", parts)


def draw_pipeline() -> str:
    """Draw the stages of a job, and the files between them."""
    stages = [
        ("scans", "NIfTI, DICOM"),
        ("ingest", "corpus/"),
        ("pretrain", "pretrain/"),
        ("publish", "backbones/"),
        ("finetune", "models/"),
        ("report", "report/"),
    ]
    parts = []
    for number, (name, made) in enumerate(stages):
        x = 10 + number * 118
        parts += [_box(x, 14, 92, 34), _text(x + 46, 36, name, "strong middle")]
        parts.append(_text(x + 46, 66, made, "small muted middle"))
        if number:
            parts.append(_arrow(x - 24, 31, x - 2, 31))
    return svg(710, 80, "The stages of a job: scans, ingest, pretrain, publish, finetune, report", parts)


DRAWINGS = {
    "order": draw_order,
    "views": draw_views,
    "loss": draw_loss,
    "resume": draw_resume,
    "pipeline": draw_pipeline,
}


def main() -> None:
    """Write all drawings."""
    IMAGES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (IMAGES / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
