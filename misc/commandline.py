"""Command lines: how they end, what their help shows, and which flag a mistyped one is nearest to.

Nothing here imports PyTorch: a help text and a mistyped flag are answered before its import, which takes seconds.
Field texts are read from the source, where they stand under the fields.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from misc.checked import Range, When, bare, choices, hints, marks, wanted

WIDTH = 100
"""Columns of the help texts."""


def end(status: int) -> NoReturn:
    """End this process. Under torchrun without the interpreter's own teardown: after it torch's threads now and then
    abort a process that has finished its work, which torchrun reports as a failure of all."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def command(work: Callable[[], None], problems: tuple[type[Exception], ...] = (), interrupted: str = "") -> int:
    """Do the work of a command line and return its exit status.

    0 at the end of the work; 1 for the named errors, which tell the user what to do: printed in one line; 130 for
    Ctrl-C, with a line about what then; 141, as the shell has it, where nobody reads the output any more (``| head``),
    without a word.
    """
    try:
        try:
            work()
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        if not _unread():
            print(f"\nerror: {error}", file=sys.stderr)
            return 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes as it ends
        return 141
    except problems as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: {interrupted}", file=sys.stderr)
        return 130
    return 0


def _unread() -> bool:
    """Whether the other end of the standard output is closed."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the short help is asked for."""
    return "--help" in argv or "-h" in argv


def as_help(argv: Sequence[str]) -> list[str]:
    """A command line for tyro, which calls the whole help --help."""
    return ["--help" if word == "--help-all" else word for word in argv]


@functools.cache
def documented(path: Path) -> dict[str, dict[str, str]]:
    """The classes of a source file, each with its fields and the texts under them, on one line each."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                field.target.id: " ".join(text.value.value.split())
                for field, text in zip(node.body, [*node.body[1:], ast.Pass()], strict=True)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            }  # fmt: skip
    return found


def columns(rows: Iterable[tuple[str, str]], indent: int = 2, width: int = 26) -> str:
    """Words and what they mean, the latter from one column on, wrapped."""
    lines: list[str] = []
    for word, text in rows:
        start = f"{' ' * indent}{word:<{width}} "
        lines += textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
    return "\n".join(lines)


def flag(path: str) -> str:
    """The flag of a dotted field: ``cam.fit.batch_size`` -> ``--cam.fit.batch-size``."""
    return "--" + path.replace("_", "-")


def _negative(path: str) -> str:
    head, dot, last = path.rpartition(".")
    return flag(f"{head}{dot}no_{last}")


def leaves(settings: Any, prefix: str = "", *, effective: bool = False) -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, value, type, class's name) of the fields of nested settings that are no settings themselves.

    effective: only those that have an effect beside the other values (misc.checked.When), and can be given by a flag.
    """
    fields = [
        (name, getattr(settings, name), hint) for name, hint in hints(type(settings)).items()
        if not effective or all(when.holds(settings) for when in marks(hint, When))
    ]  # fmt: skip
    sections = [name for name, value, _ in fields if dataclasses.is_dataclass(value)]
    for name, value, hint in fields:
        if name not in sections:
            yield prefix + name, value, hint, _text(type(settings), name)
    for name in sections:
        yield from leaves(getattr(settings, name), f"{prefix}{name}.", effective=effective)


def _text(cls: type, field: str) -> str:
    """What stands under a field, in the class or the one it is inherited from."""
    for base in cls.__mro__:
        if field in base.__dict__.get("__annotations__", {}):
            return documented(Path(inspect.getfile(base)))[base.__name__].get(field, "")
    return ""


def flags(settings: Any, prefix: str = "") -> list[str]:
    """All flags of nested settings, with the negative form of switches and other names (tyro's aliases)."""
    found = []
    for path, _, hint, _ in leaves(settings, prefix):
        found.append(flag(path))
        if bare(hint) is bool:
            found.append(_negative(path))
        found += [alias for mark in getattr(hint, "__metadata__", ()) for alias in getattr(mark, "aliases", None) or ()]
    return found


def describe(settings: Any, hidden: Collection[str] = ()) -> str:
    """Every option of nested settings that has an effect, by sections, with its value, choices, range and text.

    hidden: beginnings of dotted names to leave out.
    """
    lines: list[str] = []
    section = None
    for path, value, hint, text in leaves(settings, effective=True):
        if path.startswith(tuple(hidden)):
            continue
        if (head := path.rpartition(".")[0]) != section:
            section = head
            lines += ["", f"{flag(head)}.*" if head else "general"]
        among = choices(hint)
        said = "{" + ",".join(map(str, among)) + "}" if among else ""
        if bare(hint) is bool:
            shown = "(on)" if value else "(off)"
            said = f"off: {_negative(path)}" if value else ""
        elif isinstance(value, tuple):
            shown = " ".join(map(str, value))
        else:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
        ranges = wanted(hint) if marks(hint, Range) else ""
        lines.append(f"  {flag(path)} {shown}".rstrip())
        about = " ".join(part for part in (text, f"[{said}]" if said else "", f"[{ranges}]" if ranges else "") if part)
        lines += textwrap.wrap(about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join(lines).lstrip("\n")


def given_flags(argv: Sequence[str]) -> list[str]:
    """The flags of a command line, with hyphens, without their values."""
    return [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--") and len(word) > 2]


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Up to three known flags that a mistyped one may have meant: those of sections that end like it (``--lr``), then
    those spelled alike."""
    known = list(dict.fromkeys(known))
    alike = [one for one in known if one.lstrip("-").rpartition(".")[2] == word.lstrip("-").rpartition(".")[2]]
    return [*dict.fromkeys([*alike, *difflib.get_close_matches(word, known, 3, cutoff=0.8)])][:3]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error about a word that is not known; empty where no other is near."""
    near = nearest(word, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def source_options(path: Path, name: str) -> dict[str, str]:
    """The flags of a class of options, read from its source, each with the first sentence under its field."""
    found: dict[str, str] = {}
    texts = documented(path)[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line in next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name).body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            kind = ast.unparse(line.annotation)
            if "Positional" in kind or line.target.id not in texts:
                continue
            renamed = re.search(r"\bname='([\w-]+)'", kind)
            text = texts[line.target.id].partition(". ")[0].removesuffix(".")
            names = [renamed[1] if renamed else line.target.id, *(["no_" + line.target.id] if kind == "bool" else [])]
            for alias in (*map(flag, names), *re.findall(r"'(--[\w-]+)'", kind)):
                found[alias] = text if alias == flag(names[0]) else ""
    return found


def answer_early(program: Path, argv: Sequence[str]) -> int | None:
    """The exit status where a program's command line asks for its short help or has a flag that its class ``Options``
    lacks: both are answered without importing it. None: the program is to go on."""
    options = source_options(program, "Options")
    machine = source_options(Path(__file__).with_name("config.py"), "Machine") if "--machine" in options else {}
    options = {f: t for f, t in options.items() if f != "--machine"} | {
        f"--machine.{f.removeprefix('--')}": text for f, text in machine.items()
    }
    if wants_help(argv):
        tree = ast.parse(program.read_text(encoding="utf-8"))
        about = ast.get_docstring(tree) or ""
        unshown = [f"--machine.{name}" for name in ("compile", "channels-last", "checkpoint-every")]  # of trainings
        rows = [row for row in options.items() if row[1] and row[0] not in unshown]
        all_of_it = ("--help-all", "all options with their whole texts, defaults and choices")
        return command(lambda: print(f"{about}\n\noptions:\n{columns([*rows, all_of_it])}"))
    for word in given_flags(argv):
        if word not in (*options, "--help-all"):
            print(f"\nerror: {program.name} has no flag {word}.{did_you_mean(word, options)}", file=sys.stderr)
            return 2
    return None
