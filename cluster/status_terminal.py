"""`Status` in the terminal: colours, curves and tables with rich, or plain lines if stdout is not a terminal.

Content of a run's files is shown only as text: rich and the terminal never interpret it as a command.
"""

import time
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.inspect import plain
from cluster.status import Status
from cluster.status_files import Fault, Points, Training
from cluster.status_reader import Reader
from p2r.console import console, show
from p2r.errors import StorageError
from p2r.modes import facts_of

_REFRESH_S = 1.0
_CURVE_ROWS = 8
_BLOCKS = "▁▂▃▄▅▆▇█"
_MAX_SPARK, _BESIDE_SPARK = 32, 34
_MAX_FAULTS, _MAX_CHECKPOINTS = 5, 3
_STYLES = {"running": "bold green", "done": "bold green", "silent": "bold yellow"}
_METRICS = (
    ("images_per_s", "images/s", "{:.1f}"),
    ("pixel_pairs_per_s", "pixel pairs/s", "{:,.0f}"),
    ("wait_fraction", "data wait", "{:.1%}"),
    ("step_s", "step, s", "{:.3g}"),
    ("memory_mib", "memory, MiB", "{:,.0f}"),
    ("equivariance_error", "equivariance error", "{:.3f}"),
    ("probe_dice", "online probe, Dice", "{:.3f}"),
    ("health.effective_rank", "effective rank", "{:.1f}"),
    ("health.dead_dimensions_fraction", "dead dimensions", "{:.1%}"),
    ("health.alignment", "alignment", "{:.3f}"),
    ("health.uniformity", "uniformity", "{:.3f}"),
    ("gradient_norm", "gradient norm", "{:.2f}"),
    ("learning_rate", "learning rate", "{:.1e}"),
    ("skipped_steps", "skipped steps", "{:.0f}"),
)


def show_run(reader: Reader) -> None:
    """Print the status once.

    Raises:
        StorageError: The storage cannot be read, or holds no run.
    """
    status = reader.read()
    terminal = console()
    if terminal.is_terminal:
        terminal.print(view(status, width=terminal.width))
    else:
        for line in plain_lines(status):
            show(line)


def watch_run(reader: Reader) -> None:
    """Show the status until Ctrl-C: a live view, or, if stdout is not a terminal, one line per new report.

    Raises:
        StorageError: The storage cannot be read at the start, or holds no run.
    """
    status = reader.read()
    terminal = console()
    try:
        if not terminal.is_terminal:
            _follow_lines(reader, status)
            return
        with Live(console=terminal, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            trouble = None
            while True:
                live.update(view(status, width=terminal.width, trouble=trouble), refresh=True)
                time.sleep(_REFRESH_S)
                status, trouble = _read_again(reader, status)
    except KeyboardInterrupt:
        if terminal.is_terminal:
            terminal.print(view(status, width=terminal.width))


def _follow_lines(reader: Reader, status: Status) -> None:
    for line in plain_lines(status):
        show(line, flush=True)
    said: str | None = None
    while True:
        before = status.training and status.training.step
        time.sleep(_REFRESH_S)
        status, trouble = _read_again(reader, status)
        if trouble is not None and trouble != said:
            show(trouble, flush=True)
        said = trouble
        if status.training and status.training.step != before:
            show(_report_line(status.training), flush=True)


def _read_again(reader: Reader, status: Status) -> tuple[Status, str | None]:
    try:
        return reader.read(), None
    except StorageError as error:
        return status, str(error)


def plain_lines(status: Status) -> Iterator[str]:
    """Yield the status as plain lines, one fact per line."""
    yield plain(f"{status.name} | {status.url}").plain
    for stage in status.stages:
        yield plain(f"{stage.name:9} {stage.text or '-'}").plain
    if status.training is not None:
        yield f"newest    {_report_line(status.training)} | {_format_state(status.training)}"
    for one in status.resumed:
        yield f"resumed   from step {one.from_}"
    for fault in status.faults[-_MAX_FAULTS:]:
        yield plain(f"fault     {fault.time} | {fault.cause}: {fault.what} | {_format_decision(fault)}").plain
    for curve in status.sweep.curves:
        yield plain(
            f"few-shot  {curve.task} | {_mode_title(curve.mode)} | {_format_points(curve.points)} | {curve.split} Dice"
        ).plain
    for variant in status.variants:
        yield plain(f"variant   {variant.name} | step {variant.step}/{variant.num_steps}").plain
    for failed in status.failed:
        yield plain(f"failed    {failed.trial}: {failed.reason}").plain
    for problem in status.problems:
        yield plain(f"problem   {problem}").plain


def view(status: Status, *, width: int, trouble: str | None = None) -> RenderableType:
    """Return the status for a terminal of `width` columns."""
    width = max(40, min(width, 120))
    parts: list[RenderableType] = [_header(status)]
    if status.training is not None:
        training = status.training
        bar = ProgressBar(
            total=max(1, training.num_steps), completed=training.step, width=width - 24, complete_style="cyan"
        )
        count = f"  {training.step:,} of {training.num_steps:,}"
        parts.append(_new_grid([(bar, Text(count, style="dim"))]))
    parts += [Text(f"! {one}", style="yellow") for one in map(_visible_text, filter(None, (trouble, *status.problems)))]
    parts.append(
        _new_grid([(Text(stage.name, style="bold"), plain(stage.text or "–")) for stage in status.stages], gap=2)
    )
    if status.series.get("loss"):
        parts += [Text(), *_draw_curve(status, width)]
    figures = _metrics_table(status, width)
    if figures is not None:
        parts += [Text(), figures]
    parts += [
        part for section in (_faults_table(status), _sweep_tables(status), _other_parts(status)) for part in section
    ]
    return Group(*parts)


def _header(status: Status) -> RenderableType:
    head = Text()
    head.append_text(plain(status.name)).stylize("bold")
    if status.training is not None:
        head.append("   ").append(_format_state(status.training), style=_STYLES[status.training.state])
    return Group(head, Text(_visible_text(status.url), style="dim", no_wrap=True, overflow="ellipsis"))


def _format_state(training: Training) -> str:
    word = {"done": "pretrained", "running": "running", "silent": "silent"}[training.state]
    eta_s = training.last.get("eta_s")
    left = f", {_format_duration(eta_s)} to go" if eta_s and training.state == "running" else ""
    return f"{word}, last report {_format_duration(time.time() - training.written_at_s)} ago{left}"


def _report_line(training: Training) -> str:
    last = training.last
    parts = [f"step {training.step}/{training.num_steps}"]
    parts += [f"loss {last['loss']:.4f}"] if "loss" in last else []
    parts += [f"{last['images_per_s']:.1f} img/s"] if "images_per_s" in last else []
    parts += [f"wait {last['wait_fraction']:.1%}"] if "wait_fraction" in last else []
    parts += [f"equivariance error {last['equivariance_error']:.3f}"] if "equivariance_error" in last else []
    return " | ".join(parts)


def _draw_curve(status: Status, width: int) -> Iterator[RenderableType]:
    """Yield the loss curve in Braille dots, and below it the marks of checkpoints, resumptions and faults."""
    points = status.series["loss"]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    labels = [f"{high:.4g}", f"{low:.4g}"]
    margin = max(map(len, labels)) + 1
    columns = width - margin - 1
    first, last = 0, max(points[-1][0], 1)
    for number, row in enumerate(
        _draw_braille(points, columns, _CURVE_ROWS, first=first, last=last, low=low, high=high)
    ):
        label = labels[0] if number == 0 else labels[1] if number == _CURVE_ROWS - 1 else ""
        yield Text.assemble((f"{label:>{margin - 1}} ", "dim"), (row, "cyan"))
    marks = [" "] * columns
    colours = {}
    for steps, mark, colour in (
        ([one.step for one in status.checkpoints], "▴", "green"),
        ([one.from_ for one in status.resumed], "┆", "yellow"),
        ([one.from_step for one in status.faults], "✕", "red"),
    ):
        for step in steps:
            if step is not None and first <= step <= last:
                place = min(columns - 1, (step - first) * columns // (last - first))
                marks[place], colours[place] = mark, colour
    line = Text(" " * margin)
    for place, mark in enumerate(marks):
        line.append(mark, style=colours.get(place, ""))
    yield line
    kinds = [("▴ checkpoint", "green")] * bool(status.checkpoints) + [("┆ resumed", "yellow")] * bool(status.resumed)
    kinds += [("✕ fault", "red")] * bool(status.faults)
    told = Text(" " * margin + f"loss {values[-1]:.4f}, steps {first} to {last:,}", style="dim")
    for text, colour in kinds:
        told.append("   ").append(text, style=colour)
    yield told


def _draw_braille(
    points: Points, columns: int, rows: int, *, first: int, last: int, low: float, high: float
) -> list[str]:
    """Draw a line through the points; every character has two dots across and four down."""
    across, down = 2 * columns, 4 * rows
    dots = [[False] * across for _ in range(down)]
    places = [
        (
            min(across - 1, round((step - first) / (last - first) * (across - 1))),
            round((high - value) / ((high - low) or 1.0) * (down - 1)),
        )
        for step, value in points
    ]
    for (x0, y0), (x1, y1) in zip(places, [*places[1:], places[-1]], strict=True):
        count = max(abs(x1 - x0), abs(y1 - y0), 1)
        for part in range(count + 1):
            dots[y0 + round((y1 - y0) * part / count)][x0 + round((x1 - x0) * part / count)] = True
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of the character U+2800
    return [
        "".join(
            chr(0x2800 + sum(bits[y][x] for y in range(4) for x in range(2) if dots[4 * row + y][2 * column + x]))
            for column in range(columns)
        )
        for row in range(rows)
    ]


def _metrics_table(status: Status, width: int) -> Table | None:
    training = status.training
    if training is None:
        return None
    across = 1 if width < 90 else 2
    room = max(8, min(_MAX_SPARK, width // across - _BESIDE_SPARK))
    rows = []
    for name, title, layout in _METRICS:
        if name in training.last and (name != "skipped_steps" or training.last[name]):
            spark = _draw_spark([value for _, value in status.series.get(name, [])], room)
            rows.append(
                (
                    Text(title, style="dim"),
                    Text(layout.format(training.last[name]), justify="right"),
                    Text(spark, style="cyan"),
                )
            )
    if across == 1:
        return _new_grid(rows, gap=2)
    half = (len(rows) + 1) // 2
    blank = (Text(), Text(), Text())
    return _new_grid(
        [(*left, *right) for left, right in zip(rows[:half], [*rows[half:], blank][:half], strict=True)], gap=2
    )


def _draw_spark(values: Sequence[float], most: int) -> str:
    """Return the means of equal parts of the values, as at most `most` bars."""
    if len(values) < 2:
        return ""
    width = min(most, len(values))
    parts = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    return "".join(_BLOCKS[round((mean - low) / ((high - low) or 1.0) * (len(_BLOCKS) - 1))] for mean in means)


def _faults_table(status: Status) -> Iterator[RenderableType]:
    if status.faults:
        table = Table(
            "time", "cause", "what", "decision", title="Faults", title_justify="left", title_style="bold", box=None
        )
        for fault in status.faults[-_MAX_FAULTS:]:
            when = plain(fault.time[:19].replace("T", " "))
            table.add_row(when, plain(fault.cause), plain(fault.what), plain(_format_decision(fault)))
        yield Text()
        yield table


def _format_decision(fault: Fault) -> str:
    where = "" if fault.from_step is None else f" from step {fault.from_step}"
    limit = "" if fault.limit is None else f" of {fault.limit}"
    count = "" if fault.count is None else f" ({fault.count}{limit})"
    return f"{fault.decision}{where}{count}"


def _sweep_tables(status: Status) -> Iterator[RenderableType]:
    curves = status.sweep.curves
    for task in dict.fromkeys(curve.task for curve in curves):
        of_task = [curve for curve in curves if curve.task == task]
        numbers = sorted({point[0] for curve in of_task for point in curve.points})
        title = plain(f"{task}: {of_task[0].split} Dice by labelled patients (draws), so far")
        title.stylize("bold")
        table = Table("mode", *map(str, numbers), box=None)
        for curve in of_task:
            found = {number: f"{mean:.3f} ({draws})" for number, mean, draws in curve.points}
            table.add_row(plain(_mode_title(curve.mode)), *(found.get(number, "–") for number in numbers))
        yield Text()
        yield title
        yield table


def _other_parts(status: Status) -> Iterator[RenderableType]:
    if status.checkpoints or status.variants or status.failed:
        yield Text()
    for one in status.checkpoints[-_MAX_CHECKPOINTS:]:
        size = f"{one.num_bytes / 2**20:,.1f} MiB"
        age = _format_duration(time.time() - one.written_at_s)
        yield plain(f"checkpoint of step {one.step}   {size}   {age} ago   {one.path}")
    for variant in status.variants:
        yield plain(f"variant {variant.name}   step {variant.step} of {variant.num_steps}")
    for failed in status.failed:
        yield Text(_visible_text(f"failed: {failed.trial}: {failed.reason}"), style="red")


def _new_grid(rows: Sequence[Sequence[RenderableType]], *, gap: int = 0) -> Table:
    table = Table.grid(padding=(0, gap))
    for row in rows:
        table.add_row(*row)
    return table


def _visible_text(text: str) -> str:
    return plain(text).plain


def _mode_title(mode: str) -> str:
    facts = facts_of(mode)
    return mode if facts is None else facts.title


def _format_points(points: Sequence[tuple[int, float, int]]) -> str:
    return ", ".join(f"{number}: {mean:.3f} ({draws} draw{'s' * (draws > 1)})" for number, mean, draws in points)


def _format_duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"
