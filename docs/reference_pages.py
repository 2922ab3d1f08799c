"""The reference pages that are generated: commands from the command line's parser, keys from the schema, Python from docstrings.

`docs.hooks` adds them to the site. Nothing is written to the repository, so they cannot become outdated.
"""

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

PUBLIC = {
    "p2r": ("load_backbone", "Backbone", "load_model", "Model", "run", "open_report"),
    "p2r.loss": ("info_nce", "info_nce_within_images", "SameImage", "barlow_twins", "corresponding_points"),
    "p2r.data.order": ("global_batch", "rank_batch", "steps_per_epoch", "locate"),
    "p2r.data.stream": ("stream", "Corpus", "StreamState"),
}
"""The Python interface that others may build on, by module."""


def commands_page() -> str:
    """Return the page of the `p2r` command: arguments and options of every subcommand."""
    from typer.main import get_command

    from cluster.cli import app

    lines = ["# Commands", "", "Generated from the command line's parser. `p2r COMMAND --help` prints the same.", ""]
    for name, command in sorted(get_command(app).commands.items()):  # type: ignore[attr-defined]
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        usage = " ".join(["p2r", name, *(one.metavar or (one.name or "").upper() for one in arguments), "[OPTIONS]"])
        lines += [f"## p2r {name}", "", *_paragraphs(command.help or ""), "```text", usage, "```", ""]
        rows = [(_spelling(one), getattr(one, "help", None) or "") for one in command.params if one.name != "help"]
        lines += _table(("argument or option", "meaning"), rows)
    return "\n".join(lines)


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or (parameter.name or '').upper()}`"
    return ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])


def job_page(schema: Mapping[str, Any] | None = None) -> str:
    """Return the page of a job file: every section and key, with type, bounds, default and meaning."""
    schema = schema or json.loads((ROOT / "jobs/job.schema.json").read_text())
    lines = ["# Job file", "", "Generated from `jobs/job.schema.json`, which `p2r schema` prints.", ""]
    for title, section in [("The job", schema), *sorted(schema["$defs"].items())]:
        lines += [f"## {title}", "", *_paragraphs(section.get("description", ""))]
        if "enum" in section:
            lines += ["One of " + ", ".join(f"`{value}`" for value in section["enum"]) + ".", ""]
        required = section.get("required", [])
        rows = [
            (f"`{key}`", _type_of(value), _default_of(value, key in required), value.get("description", ""))
            for key, value in section.get("properties", {}).items()
        ]
        lines += _table(("key", "type", "default", "meaning"), rows)
    return "\n".join(lines)


def _type_of(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type_of(option) for option in field["anyOf"]))
    if "allOf" in field:
        return " and ".join(_type_of(option) for option in field["allOf"])
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    name = str(field.get("type", "any"))
    if name == "array" and isinstance(field.get("items"), Mapping):
        name = f"list of {_type_of(field['items'])}"
    if name == "object" and isinstance(field.get("additionalProperties"), Mapping):
        name = f"mapping to {_type_of(field['additionalProperties'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[word]}" for word, sign in signs.items() if word in field]
    return " ".join([name, *([f"({', '.join(bounds)})"] if bounds else [])])


def _default_of(field: Mapping[str, Any], is_required: bool) -> str:
    if is_required:
        return "required"
    if "default" not in field:
        return ""
    text = json.dumps(field["default"])
    return (
        f"`{text}`"
        if len(text) <= 40
        else "its keys' defaults"
        if isinstance(field["default"], dict)
        else "see the schema"
    )


def python_page() -> str:
    """Return the page of the Python interface: signature and docstring of every public name."""
    lines = ["# Python", "", "Generated from docstrings. Other names may change without notice.", ""]
    for module_name, names in PUBLIC.items():
        module = import_module(module_name)
        lines += [f"## {module_name}", ""]
        for name in names:
            lines += _entry(f"{module_name}.{name}", getattr(module, name), depth=3)
    return "\n".join(lines)


def _entry(title: str, thing: Any, *, depth: int) -> list[str]:
    text = inspect.getdoc(thing) or ""
    lines = [f"{'#' * depth} {title}", "", "```text", f"{title}{_signature(thing)}", "```", "", *docstring_lines(text)]
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            shown = member.fget if isinstance(member, property) else member
            if not name.startswith("_") and (
                inspect.isfunction(shown) or isinstance(member, classmethod | staticmethod)
            ):
                lines += _entry(f"{thing.__name__}.{name}", getattr(thing, name), depth=4)
    return lines


def _signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"\b(?:torch|numpy|pathlib|collections\.abc|typing|p2r)\.(?:\w+\.)*(?=\w)", "", text)
    if len(text) > 60 and text.startswith("("):
        inner, _, result = text[1:].rpartition(")")
        text = "(\n" + "".join(f"    {one},\n" for one in _split_parameters(inner)) + f"){result}"
    return text


def _split_parameters(text: str) -> list[str]:
    """Split a signature at its commas, not at those within brackets or quotes."""
    return [part.strip() for part in re.split(r",\s*(?![^\[(]*[\])])", text)]


def docstring_lines(text: str) -> list[str]:
    """Turn a docstring in Google form into Markdown: sections become bold words, their entries a list."""
    lines: list[str] = []
    is_listed = is_code = False
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields|Source|Example):", line):
            is_listed = True
            lines += ["", f"**{line[:-1]}**", ""]
        elif is_listed and (entry := re.match(r"    (\w[\w, *]*): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {escape(entry[2])}")
        elif is_listed and line.startswith("    "):
            lines.append(("  " if lines[-1].startswith(("- ", "  ")) else "") + escape(line.strip()))
        else:
            is_listed = False
            starts_code = line.startswith("    ")
            if starts_code and not is_code:
                lines.append("")
            is_code = starts_code or (is_code and not line)
            lines.append(line if is_code else escape(line))
    return [*lines, ""]


def escape(text: str) -> str:
    """Escape what Markdown or HTML would interpret, outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<*_\[\]])", r"\\\1", part) for part in parts)


def _paragraphs(text: str) -> list[str]:
    return [*(escape(line.strip()) for line in inspect.cleandoc(text).splitlines()), ""]


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"

    shown = [row((*cells[:-1], escape(cells[-1]))) for cells in rows]
    return [row(header), row("---" for _ in header), *shown, ""] if shown else []


PAGES = {"reference/commands.md": commands_page, "reference/job.md": job_page, "reference/python.md": python_page}
"""Generated pages by their path in the site."""
