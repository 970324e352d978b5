"""Rules of the house that the source itself can be asked: which way imports point, and one meaning a public name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import ROOM

FILES = sorted(
    path.relative_to(ROOM)
    for part in ("misc", "net", "step", "voc12", "scripts", "run_sample.py", "evaluation.py", "predict.py")
    for path in (ROOM.joinpath(part).rglob("*.py") if (ROOM / part).is_dir() else [ROOM / part])
)
SOURCES = {path.with_suffix("").as_posix().removesuffix("/__init__").replace("/", "."): path for path in FILES}
"""Module -> file."""
TREES = {module: ast.parse((ROOM / path).read_text()) for module, path in SOURCES.items()}

BELOW = {"misc": (), "net": ("misc",), "voc12": ("misc",), "step": ("misc", "net", "voc12")}
"""Package -> packages that it may import besides itself."""
NET = {
    "foreign": ("foreign",),
    "backbone": ("backbone", "foreign", "start_weights", "contract"),
    "shared": ("shared", "backbone", "foreign", "start_weights", "contract", "groups", "losses", "registry"),
}
"""Room of net -> what of net it may import; those of methods (seed, refine, segment) may import all but each other."""
METHODS = ("net.seed", "net.refine", "net.segment")

MANY = {
    "main": "the command line of each program",
    "run": "each step's one function",
}
"""Public names that stand in several modules, and why they may."""


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under TYPE_CHECKING."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _run(child)


def imported(module: str) -> set[str]:
    """Modules of the product that a module imports, anywhere in it but under TYPE_CHECKING."""
    found: set[str] = set()
    for node in _run(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name for name in names if name in SOURCES}
    return found


def room(module: str) -> tuple[str, str]:
    """(package, room within it) of a module: net.seed.seam -> ("net", "seed")."""
    parts = module.split(".")
    return parts[0], parts[1] if len(parts) > 1 else ""


LONGEST = 500
"""Lines of a file (docs/design.md, section 2)."""


def test_no_file_is_too_long() -> None:
    lines = {str(path): len((ROOM / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: count for path, count in lines.items() if count > LONGEST}


@pytest.mark.parametrize("package", BELOW)
def test_imports_point_down(package: str) -> None:
    wrong = [
        (module, other)
        for module in SOURCES
        if room(module)[0] == package
        for other in imported(module)
        if room(other)[0] not in (package, *BELOW[package])
    ]
    assert not wrong


def test_no_step_imports_a_step_and_no_method_another_method() -> None:
    steps = {m for m in SOURCES if m.count(".") == 1 and m.startswith("step.") and m not in ("step.lib", "step.plan")}
    assert not [(m, o) for m in steps for o in imported(m) & steps]
    owners = {m: ".".join(m.split(".")[:3]) for m in SOURCES if m.startswith(tuple(f"{r}." for r in METHODS))}
    assert not [(m, o) for m, own in owners.items() for o in imported(m) if owners.get(o, own) != own]


@pytest.mark.parametrize("name", NET)
def test_rooms_of_net_import_what_lies_below_them(name: str) -> None:
    for module in SOURCES:
        if room(module) == ("net", name):
            assert {room(o)[1] for o in imported(module) if o.startswith("net.")} <= {"", *NET[name]}, module


def test_nothing_imports_in_a_circle() -> None:
    graph = {module: imported(module) - {module} for module in SOURCES}
    for module, others in graph.items():  # a package is run first, but what it imports of itself is no circle
        graph[module] = {o for o in others if not module.startswith(f"{o}.") or o not in SOURCES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def defined(tree: ast.Module) -> set[str]:
    """Public names that a module defines at its top."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_means_one_thing() -> None:
    places: dict[str, list[Path]] = defaultdict(list)
    for module, tree in TREES.items():
        for name in defined(tree):
            places[name].append(SOURCES[module])
    several = {name: files for name, files in places.items() if len(files) > 1}
    assert not {name: files for name, files in several.items() if name not in MANY}
    assert set(MANY) <= set(several)  # nothing is allowed that is not needed


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those below fields and constants included."""
    for node in ast.walk(tree):
        lines = getattr(node, "body", None)
        for line in lines if isinstance(lines, list) else ():
            match line:
                case ast.Expr(ast.Constant(str(text))):
                    yield line.lineno, text


@pytest.mark.slow
def test_no_docstring_is_a_single_word() -> None:
    sources = [ROOM / path for path in FILES] + sorted((ROOM / "tests").rglob("*.py"))
    short = [
        f"{path.relative_to(ROOM)}:{number}: {text}"
        for path in sources for number, text in docstrings(ast.parse(path.read_text())) if len(text.split()) < 2
    ]  # fmt: skip
    assert not short
