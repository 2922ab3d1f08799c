"""Names that source files use, resolved through their imports: `from json import loads as read` makes `read(x)` a use of json.loads."""

import ast
from collections.abc import Iterator


def uses_of(text: str) -> Iterator[tuple[str, ast.expr]]:
    """Yield every name and attribute that a source text uses, as a dotted path, and its node."""
    tree = ast.parse(text)
    imported = _imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield _resolve(node, imported), node


def calls_of(text: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call in a source text: the function as a dotted path, and its node."""
    tree = ast.parse(text)
    imported = _imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield _resolve(node.func, imported), node


def _imported_names(tree: ast.Module) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        if isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def _resolve(node: ast.expr, imported: dict[str, str]) -> str:
    first, _, rest = ast.unparse(node).partition(".")
    return f"{imported.get(first, first)}.{rest}".rstrip(".")
