"""Mutation testing: change one place of a module, run its tests, and list the changes that no test noticed.

    python -m tests.mutate p2r/data/order.py --tests tests/p2r/data/test_order.py --minutes 5

A survivor is either a missing assertion or an equivalent change; a person decides. Mutants run in a copy of the repository, one
at a time, in children forked from a process that has already imported torch. A mutant costs its tests and no start-up. mutmut
skips decorated functions, and with them the gradients of our losses (static methods of `autograd.Function`); cosmic-ray imports
torch again for every mutant. Messages, docstrings and annotations stay.
"""

import argparse
import ast
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitXor: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "argmax": "argmin", "amax": "amin", "left": "right"}


@dataclass(frozen=True)
class Mutant:
    """One changed place."""

    line: int
    before: str
    after: str
    source: str
    """The whole changed module."""


def mutants_of(source: str) -> list[Mutant]:
    """Return all mutants of a module, in the order of its lines."""
    places = list(_places(ast.parse(source)))
    found = []
    for number, _ in enumerate(places):
        tree = ast.parse(source)
        node = list(_places(tree))[number]
        before = ast.unparse(node)
        _change(node)
        found.append(Mutant(node.lineno, before, ast.unparse(node), ast.unparse(ast.fix_missing_locations(tree))))
    return sorted(found, key=lambda mutant: mutant.line)


def _places(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Yield the nodes that `_change` can change, leaving out messages, annotations and docstrings."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.arg | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.stmt | ast.expr) and _is_changeable(node):
        yield node
    skipped = {"annotation", "returns", "decorator_list", "type_params"}
    for field, value in ast.iter_fields(node):
        if field in skipped or (isinstance(node, ast.keyword) and node.arg == "strict"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _places(child)


def _is_changeable(node: ast.stmt | ast.expr) -> bool:
    match node:
        case (
            ast.Compare(ops=[operator]) | ast.BinOp(op=operator) | ast.BoolOp(op=operator) | ast.AugAssign(op=operator)
        ):
            return type(operator) in _OPERATORS
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            return not isinstance(operand, ast.Constant)
        case ast.Constant(value=bool() | int() | float()):
            return True
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in _NAMES
        case ast.IfExp() | ast.Continue() | ast.Break():
            return True
        case ast.Expr(value=ast.Call()):
            return True
    return False


def _change(node: ast.stmt | ast.expr) -> None:
    match node:
        case ast.Compare(ops=[operator]):
            node.ops = [_OPERATORS[type(operator)]()]  # type: ignore[list-item]
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) | ast.AugAssign(op=operator):
            node.op = _OPERATORS[type(operator)]()  # type: ignore[assignment]
        case ast.UnaryOp(op=ast.Not()):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
        case ast.UnaryOp():
            node.op = ast.UAdd()
        case ast.Constant(value=bool() as value):
            node.value = not value
        case ast.Constant(value=int() | float() as number):
            node.value = number + 1
        case ast.Name(id=name):
            node.id = _NAMES[name]
        case ast.Attribute(attr=name):
            node.attr = _NAMES[name]
        case ast.IfExp():
            node.body, node.orelse = node.orelse, node.body
        case ast.Expr():
            node.value = ast.Constant(None)
        case ast.Continue() | ast.Break():
            node.__class__ = ast.Pass  # type: ignore[assignment]


def run_tests(folder: Path, tests: Sequence[str], *, cpu_s: int, keyword: str = "") -> str:
    """Return `killed`, `survived` or `timeout` for the tests of a copy, run in a forked child with a limit on CPU time."""
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
            _become_pytest(folder, tests, keyword)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    deadline = time.monotonic() + 30 * cpu_s  # for mutants that wait for ever
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            exit_code = os.waitstatus_to_exitcode(status)
            return "timeout" if exit_code == -signal.SIGXCPU else "killed" if exit_code else "survived"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def _become_pytest(folder: Path, tests: Sequence[str], keyword: str) -> None:
    os.setsid()
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", os.environ["P2R_MUTATED_FROM"]))]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "p2r", "cluster")]:
        del sys.modules[name]
    os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = True
    quiet = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import pytest

    chosen = ["-k", keyword] if keyword else []
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *chosen, *tests])))


def copy_repository(target: Path) -> None:
    """Copy the files that git knows, and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout
    for name in listed.splitlines():
        if Path(name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, target / name)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Print a line for every survivor, then the counts."""
    parser = argparse.ArgumentParser(
        description="Change a module place by place, and list the changes that its tests do not notice."
    )
    parser.add_argument("module", type=Path)
    parser.add_argument("--tests", nargs="+", required=True)
    parser.add_argument("-k", dest="keyword", default="", help="pytest's -k")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="of CPU time, then stop; mutants come in seeded order"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, nargs="*", help="only mutants of these lines")
    parser.add_argument("--output", type=Path, help="a JSON object per mutant")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", P2R_MUTATED_FROM=str(Path.cwd()), PYTHONDONTWRITEBYTECODE="1")
    import scipy.ndimage  # noqa: F401 (imported here, once for all children)
    import torch.distributed  # noqa: F401

    mutants = mutants_of(arguments.module.read_text())
    if arguments.lines:
        mutants = [mutant for mutant in mutants if mutant.line in arguments.lines]
    random.Random(arguments.seed).shuffle(mutants)
    counts = dict.fromkeys(("killed", "survived", "timeout"), 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_repository(folder)
        if run_tests(folder, arguments.tests, cpu_s=600, keyword=arguments.keyword) != "survived":
            print((folder / "output").read_text(), "the tests fail without any change", file=sys.stderr)
            return 2
        baseline = _cpu_s()
        for mutant in mutants:
            if _cpu_s() > arguments.minutes * 60:
                break
            (folder / arguments.module).write_text(mutant.source)
            outcome = run_tests(folder, arguments.tests, cpu_s=int(20 + 4 * baseline), keyword=arguments.keyword)
            counts[outcome] += 1
            if outcome == "survived":
                print(f"{arguments.module}:{mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
            if arguments.output:
                row = {**asdict(mutant), "module": str(arguments.module), "outcome": outcome}
                del row["source"]
                with arguments.output.open("a") as out:
                    out.write(json.dumps(row) + "\n")
    tried = sum(counts.values())
    print(f"{arguments.module}: {tried} of {len(mutants)} mutants, {counts}; the tests take {baseline:.1f} s of CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
