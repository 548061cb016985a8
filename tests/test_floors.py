"""The house has floors: a room imports only from rooms above it, and no import goes round in a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fewbits"
ROOMS = (
    "errors places formats choice ranges numerics precision kernels parallel nn optim graph step data checkpoint train "
    "lab export report"
)
ORDER = {name: floor for floor, name in enumerate([*ROOMS.split(), "integrations", "cli", "__main__"])}
FILES = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def imports(module: str) -> set[str]:
    """The modules of ours that `module` imports anywhere, inside functions too; not those for type checkers alone."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {id(node) for block in guarded for node in ast.walk(block)}
    found = set()
    for node in (node for node in ast.walk(tree) if id(node) not in skipped):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) + "." if node.level else ""
            origin = (package + (node.module or "")).rstrip(".")
            inner = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else origin for name in inner}
    return {name for name in found if name in MODULES and name != "fewbits"}


def floor(module: str) -> int:
    return ORDER[module.split(".")[1]]


def test_every_room_imports_only_from_rooms_above_it():
    rooms = [name for name in MODULES if name != "fewbits"]
    assert {(m, below) for m in rooms for below in imports(m) if floor(below) > floor(m)} == set()


def test_no_import_goes_round_in_a_circle():
    list(TopologicalSorter({name: imports(name) for name in MODULES if name != "fewbits"}).static_order())
