"""Command lines: how they end, what their help shows, and which flag a mistyped one is nearest to.

Nothing here imports PyTorch, which takes seconds: help texts and mistyped flags are answered before that import.
The help text of a field is its docstring, read from the source file.
"""

from __future__ import annotations

import _thread
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from misc.checked import Names, Range, When, bare, choices, hints, marks, wanted

WIDTH = 100
"""Width of the help texts in characters."""


class WrongCall(ValueError):
    """The call can't be carried out as it was given, and nothing was done: exit status 2."""


@contextlib.contextmanager
def before_work(problems: tuple[type[Exception], ...]) -> Iterator[None]:
    """A block that checks a call before any work: of the errors ``problems`` in it, the call is to blame."""
    try:
        yield
    except problems as error:
        raise WrongCall(str(error)) from error


def end(status: int) -> NoReturn:
    """End this process.

    Under torchrun the interpreter's teardown is skipped: during it, torch's threads sometimes abort a process that has
    finished its work, and torchrun then reports that all processes failed.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def command(work: Callable[[], int | None], problems: tuple[type[Exception], ...] = (),
            interrupted: str | Callable[[], str] | None = "") -> int:  # fmt: skip
    """Run the work of a command line and return its exit status.

    0, or what ``work`` returns: finished. 2: ``WrongCall``. 1: one of the errors in ``problems``, the work failed. Both
    tell the user what to do and are printed without a traceback. 130: Ctrl-C; ``interrupted``, or what it returns then,
    is printed; None: the work only prepares, and Ctrl-C stays what ``begin`` made it. 141 (as in a shell): the reader
    of the output has gone (``| head``).

    Letters that the output's encoding lacks, as in file names that are not in UTF-8, are printed as escapes.
    """
    status = 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with contextlib.nullcontext() if interrupted is None else _raising_interrupts():
            try:
                status = work() or 0
            finally:
                sys.stdout.flush()
    except BrokenPipeError as error:
        if not _unread():
            print(f"\nerror: {error}", file=sys.stderr)
            return 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit
        return 141
    except (WrongCall, *problems) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2 if isinstance(error, WrongCall) else 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: {interrupted() if callable(interrupted) else interrupted or ''}", file=sys.stderr)
        return 130
    return status


def parse_options(target: Callable[..., Any], args: Sequence[str] | None = None, **options: Any) -> Any:
    """``tyro.cli`` whose errors are one line: raises WrongCall. A request for help ends the process."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(target, args=None if args is None else list(args), **options)
    except SystemExit as ended:
        if not ended.code:
            raise
        raise WrongCall(_in_one_line(said.getvalue())) from None
    sys.stderr.write(said.getvalue())
    return parsed


def _in_one_line(text: str) -> str:
    """tyro's message without title, box and the help below it, in the form: flag, value, what it must be."""
    _, *lines = [line.strip("│╭╮╰╯ ") for line in text.strip().splitlines()] or [""]
    told = ""
    for line in lines:
        is_rule = bool(line) and not line.strip("─-")
        if is_rule and told:
            break
        told += "" if is_rule else f" {line}"
    told = " ".join(told.split())
    if found := re.fullmatch(r"Error parsing ([\w.-]+): (\w+) = (.*)", told):
        return f"{flag(re.sub(r'^[A-Z][A-Za-z]*[.]', '', f'{found[1]}.{found[2]}'))} {found[3]}"
    if found := re.fullmatch(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.", told):
        among = found[3].replace("'", "").strip(", ")
        return f"{found[2]} {found[1]} is not possible: it must be one of {among}."
    if found := re.fullmatch(r"Missing value for argument '(.*)'\. Expected (\d+) values\.", told):
        return f"{found[1]} needs {'a value' if found[2] == '1' else f'{found[2]} values'}."
    if found := re.fullmatch(r"Missing from [^:]*: (-*\S+).*", told):
        return f"{found[1]} is required."
    if found := re.match(r"Error parsing (\S+): no type matching (.+) could be instantiated from \[(.*?)\]\.", told):
        given = found[3].replace("'", "").replace(",", "")
        kinds = found[2].replace("{None}", "None").replace("|", " or ")
        return f"{found[1]} {given} is not possible: it must be {kinds}."
    return re.sub(r"^\w+Options: ", "", told.removeprefix("Error parsing "))


def run_script(
    main: Callable[..., int | None], problems: tuple[type[Exception], ...] = (ValueError, OSError), **options: Any
) -> NoReturn:
    """Run a script whose options are the arguments of ``main``, and end the process; ``options``: of ``tyro.cli``."""

    @functools.wraps(main)
    def given(*args: Any, **settings: Any) -> Callable[[], int | None]:
        return functools.partial(main, *args, **settings)

    end(command(lambda: parse_options(given, **options)(), problems))


def begin(name: str) -> None:
    """Called first by a program with its ``__name__``: Ctrl-C while it imports ends it with one line and status 130. In
    worker processes, which import the program too, Ctrl-C is left to the main process."""
    if name == "__main__":
        signal.signal(signal.SIGINT, _end_interrupted)
    elif name == "__mp_main__":
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _raising_interrupts() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt within the block; what ``begin`` set up holds again after it, since a program may
    import more between two pieces of work."""
    while_importing = signal.getsignal(signal.SIGINT) is _end_interrupted
    if while_importing:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    told, again = sys.unraisablehook, threading.Timer(0, _interrupt_main)

    def send_again(lost: Any) -> None:
        nonlocal again
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            told(lost)
        elif not sys.is_finalizing():
            again = threading.Timer(0.01, _interrupt_main)  # not from here, where it would be lost again
            again.daemon = True
            again.start()

    sys.unraisablehook = send_again  # a __del__ or a weak reference's callback can't pass on what arrives in it
    try:
        yield
    finally:
        again.cancel()
        sys.unraisablehook = told
        if while_importing:
            signal.signal(signal.SIGINT, _end_interrupted)


def _interrupt_main() -> None:
    """Ctrl-C once more, for the main thread, which it also wakes where the system can do that."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


def _end_interrupted(number: int, frame: object) -> None:
    os.write(2, b"\ninterrupted: nothing was begun.\n")
    os._exit(130)


@contextmanager
def holding_interrupts() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block. For starting worker processes, forked or spawned, which inherit
    from their first moment on that it is not for them; and for what would lose it, such as a ``__del__``.

    What processes inherit is this thread's mask of signals. It is not enough for this process, in which another thread
    (of a math library, of a progress bar) may be given the signal: Python acts on it in the main thread even then.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    held: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def _unread() -> bool:
    """Whether the other end of the standard output is closed."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the command line asks for the short help."""
    return "--help" in argv or "-h" in argv


def as_help(argv: Sequence[str]) -> list[str]:
    """The command line for tyro, where --help means the full help."""
    return ["--help" if word == "--help-all" else word for word in argv]


@functools.cache
def documented(path: Path) -> dict[str, dict[str, str]]:
    """Docstrings of the fields of every class in a source file: {class: {field: text in one line}}."""
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
    """A two-column table: words, and their explanations wrapped in an aligned column."""
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
    """Yields (dotted name, value, type, help text) of the leaf fields of nested settings.

    effective: only fields that have an effect given the other values (misc.checked.When).
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
    """Docstring of a field, from the class or the base class that defines it."""
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
    """Every option of nested settings that has an effect, by section, with value, choices, range and help text.

    hidden: prefixes of dotted names to leave out.
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
        ranges = wanted(hint) if marks(hint, Range) + marks(hint, Names) else ""
        lines.append(f"  {flag(path)} {shown}".rstrip())
        about = " ".join(part for part in (text, f"[{said}]" if said else "", f"[{ranges}]" if ranges else "") if part)
        lines += textwrap.wrap(about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join(lines).lstrip("\n")


def given_flags(argv: Sequence[str]) -> list[str]:
    """The flags of a command line, with hyphens, without their values."""
    return [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--") and len(word) > 2]


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Up to three known flags that a mistyped one may have meant: first flags with the same last part (``--lr``),
    then flags spelled alike, then those whose last part is (``--cam.presett``)."""
    known = list(dict.fromkeys(known))
    by_last: dict[str, list[str]] = {}
    for one in known:
        by_last.setdefault(_last_part(one), []).append(one)
    last = _last_part(word)
    alike = [*by_last.get(last, ()), *difflib.get_close_matches(word, known, 3, cutoff=0.8)]
    if not alike:
        alike = [one for part in difflib.get_close_matches(last, by_last, 3, cutoff=0.8) for one in by_last[part]]
    return [*dict.fromkeys(alike)][:3]


def _last_part(flag: str) -> str:
    return flag.lstrip("-").rpartition(".")[2]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The suggestion at the end of an error about an unknown word; empty if no known word is similar."""
    near = nearest(word, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def source_options(path: Path, name: str) -> dict[str, str]:
    """The flags of a class of options with the first sentence of each field's docstring, read from its source file."""
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


def answer_early(program: Path, argv: Sequence[str], usage: str) -> int | None:
    """Answer a request for the short help, or an unknown flag of a program, without importing the program; ``usage``:
    what its command line is made of.

    The program's options are its class ``...Options``. Returns the exit status, or None if the program should go on.
    """
    tree = ast.parse(program.read_text(encoding="utf-8"))
    (name,) = (n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Options"))
    options = source_options(program, name)
    machine = source_options(Path(__file__).with_name("config.py"), "Machine") if "--machine" in options else {}
    options = {f: t for f, t in options.items() if f != "--machine"} | {
        f"--machine.{f.removeprefix('--')}": text for f, text in machine.items()
    }
    if wants_help(argv):
        about = ast.get_docstring(tree) or ""
        unshown = [f"--machine.{name}" for name in ("compile", "channels-last", "checkpoint-every")]  # of trainings
        rows = [row for row in options.items() if row[1] and row[0] not in unshown]
        all_of_it = ("--help-all", "all options with full descriptions, defaults and choices")
        called = f"usage: python {program.name} {usage}"
        return command(lambda: print(f"{called}\n\n{about}\n\noptions:\n{columns([*rows, all_of_it])}"))
    for word in given_flags(argv):
        if word not in (*options, "--help-all"):
            print(f"\nerror: {program.name} has no flag {word}.{did_you_mean(word, options)}", file=sys.stderr)
            return 2
    return None
