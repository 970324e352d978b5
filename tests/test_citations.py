"""Citations such as ``seam.md section 4.1`` lead somewhere, and no help text holds one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = r"(?:\d+(?:\.\d+)*|[A-D](?:\.\d+)?)(?![\w.]*\w)"
"""Of a heading or a numbered item: 4, 4.1, A, A.3."""
NUMBERS = rf"{NUMBER}(?:(?:,\s+and\s+|,\s+|\s+and\s+|\s+to\s+){NUMBER})*"
CITATION = re.compile(
    rf"\b([a-z_]+)\.md`?,?\s+((?:sections?|parts?)\s+)?({NUMBERS})(?:,\s+(?:trap|rule|steps?)\s+(\d+)(?:\s+(?:and|to)\s+(\d+))?)?"
)
UNREADABLE = re.compile(rf"\b[a-z_]+\.md`?,?\s+(?:sections?|parts?)\s+(?!{NUMBER})\S+")
NAMED = re.compile(r"(?<![\w/*-])((?:[\w-]+/)*[A-Za-z][\w-]*\.md)\b")


def list_sources() -> list[Path]:
    """Every text of the project that may cite: code, scripts, documents."""
    skipped = {".git", ".venv", "runs", "__pycache__"}
    found = [p for p in ROOT.rglob("*") if p.suffix in (".py", ".sh", ".md", ".jinja") and not skipped & set(p.parts)]
    return sorted(found)


def flatten(text: str) -> str:
    """The text on one line, without comment marks at the beginning of lines: citations run over line ends."""
    return re.sub(r"\s*\n\s*(?:#+\s)?\s*", " ", text)


@cache
def documents() -> dict[str, Path]:
    return {path.name: path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}


def read_headings(text: str) -> dict[str, set[str]]:
    """{number of a heading: numbers of the items of the numbered lists below it, sub-headings included}."""
    found: dict[str, set[str]] = {}
    open_ones: list[str] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if fenced:
            continue
        if heading := re.match(rf"#+\s+({NUMBER})\.?\s", line):
            number = heading[1]
            open_ones = [number[:i] for i in range(1, len(number) + 1) if i == len(number) or number[i] == "."]
            for part in open_ones:
                found.setdefault(part, set())
        elif line.startswith("#"):
            open_ones = []
        elif item := re.match(r"\s*(?:[-*] )?(\d+)\. ", line):
            for part in open_ones:
                found[part].add(item[1])
    return found


@cache
def headings(name: str) -> dict[str, set[str]]:
    return read_headings(documents()[name].read_text())


def find_dangling(text: str) -> list[str]:
    """Citations of a text that lead nowhere."""
    text = flatten(text)
    lost = [f"{match[0]}: which section?" for match in UNREADABLE.finditer(text)]
    for match in CITATION.finditer(text):
        name = f"{match[1]}.md"
        if name not in documents():
            continue  # told below
        there, cited = headings(name), re.findall(NUMBER, match[3])
        for number in cited:
            section, _, item = number.rpartition(".")
            if number not in there and item not in there.get(section, ()):
                lost.append(f"{match[0]}: no {number}")
        for item in filter(None, (match[4], match[5])):
            if not any(item in there.get(number, ()) for number in cited):
                lost.append(f"{match[0]}: no item {item}")
    return lost + [f"{name}: no such file" for name in NAMED.findall(text) if Path(name).name not in documents()]


@pytest.mark.parametrize("path", list_sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_citations_lead_somewhere(path: Path) -> None:
    assert find_dangling(path.read_text()) == []


@pytest.mark.parametrize("text", [
    "(seam.{} section 99)", "(seam.{} 4.99)", "(seam.{}\n    # sections 4 to 99)", "(nowhere.{} section 1)",
    "see nowhere.{}", "(seam.{} section 7, trap 99)", "`psa.{}` section four", "deeplab.{} A.3, B.99",
    "docs/design.{} section 2, rule 99",
])  # fmt: skip
def test_a_wrong_citation_is_found(text: str) -> None:
    assert find_dangling(text.format("md"))


def test_right_citations_are_let_through() -> None:
    text = "(seam.{0} section\n    # 4.1, psa.{0} sections 5.2 and 6; deeplab.{0} A.3, B.3, C.4; "
    text += "getam.{0} 4.7; psa.{0} section 8, trap 8)"
    assert find_dangling(text.format("md")) == []
    assert len(CITATION.findall(flatten(text.format("md")))) == 5


def list_help_texts(text: str) -> list[str]:
    """What a command line may show of a module: docstrings of dataclasses of options (those whose fields have
    docstrings) and of these fields; where the module makes a command line, also its own docstring and those of its
    functions."""
    tree = ast.parse(text)
    makes_command_line = re.search(r"tyro\.cli\(|subcommand_cli|commandline\.(parse_options|run_script)\(", text)
    texts = [ast.get_docstring(tree)] if makes_command_line else []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            values = [s.value for s in node.body if isinstance(s, ast.Expr)]
            strings = [str(value.value) for value in values if isinstance(value, ast.Constant)]
            texts += strings if len(strings) > 1 else []
        elif isinstance(node, ast.FunctionDef) and makes_command_line and not node.name.startswith("_"):
            texts.append(ast.get_docstring(node))
    return [text for text in texts if text]


def cited_in_help(text: str) -> list[str]:
    """Specifications that the help texts of a module name; documents for users may be named."""
    specifications = {path.stem for path in (ROOT / "docs" / "spec").glob("*.md")} | {"design"}
    found = [name for shown in list_help_texts(text) for name in re.findall(r"\b([a-z_]+)\.md\b", shown)]
    return [name for name in found if name in specifications]


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in list_sources() if p.suffix == ".py" and "tests" not in p.parts],
                         ids=lambda p: str(p.relative_to(ROOT)))  # fmt: skip
def test_help_texts_hold_no_citation(path: Path) -> None:
    assert cited_in_help(path.read_text()) == [], "put the citation into a comment beside the field"


def test_a_citation_in_a_help_text_is_found() -> None:
    options = '@dataclass(frozen=True)\nclass Options:\n    """{}"""\n    lr: float = 1\n    """{}"""\n'
    cited = "Rate (seam.{} 4)".format("md")
    assert cited_in_help(options.format("Options.", cited)) == cited_in_help(options.format(cited, "Rate.")) == ["seam"]
    assert cited_in_help(options.format("Options.", "Rate.")) == []
    for parser in ("tyro.cli", "commandline.run_script"):
        assert cited_in_help(f'def main(lr: float) -> None:\n    """{cited}"""\n\n\n{parser}(main)\n') == ["seam"]
