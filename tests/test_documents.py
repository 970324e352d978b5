"""What README.md and docs/ tell people to type: every command names files, options and tests that exist, and the lines
of Python run."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image
from running import ROOM, make_set, run

import evaluation
import predict
from net import registry
from step.lib import parsing
from step.lib.config import default_config
from voc12.prepare.__main__ import COMMANDS

DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in (ROOM / "docs").glob("*.md"))]
STANDS_FOR = {"METHOD": "seam", "IMAGES...": "a.jpg", "V": "1", "FIELD": "aff.walk.alpha"}
"""What is put in place of a document's placeholders."""


def read_commands(name: str) -> list[str]:
    """Command lines of a document, in code blocks and in backticks, without comments; ``...`` at the end is cut off."""
    text = (ROOM / name).read_text()
    fenced = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
    blocks, prose = fenced.findall(text), fenced.sub("", text)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", re.sub(r" +#.*", "", block)).splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    started = (line.strip() for line in lines)
    return [re.sub(r" (\[[^]]*\]|\.\.\.)", "", line) for line in started if re.match(r"(python|bash|torchrun) ", line)]


def check_command(line: str) -> None:
    """Raises for a command that names an option, file, command or test that does not exist; runs none."""
    words = [STANDS_FOR.get(word, word) for word in shlex.split(line)]
    if words[0] == "torchrun":
        words = ["python", *words[words.index("run_sample.py") :]]
    program, arguments = words[1], words[2:]
    if words[0] == "bash":
        assert (ROOM / program).is_file()
    elif program == "run_sample.py":
        parsing.parse([word for word in arguments if word not in ("--help", "--help-all")])
    elif program in ("predict.py", "evaluation.py"):
        options = {"predict.py": predict.PredictionOptions, "evaluation.py": evaluation.EvaluationOptions}[program]
        tyro.cli(options, args=arguments)
    elif program == "-m" and arguments[0] == "pytest":
        assert arguments[1:] and all((ROOM / path).exists() for path in arguments[1:])
    elif program == "-m" and arguments[0] == "voc12.prepare" and len(arguments) > 1:
        takes_flags_only = functools.wraps(COMMANDS[arguments[1]])(lambda *_, **__: None)
        tyro.cli(takes_flags_only, args=arguments[2:])
    elif program == "-m":
        module = ROOM / arguments[0].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        listed = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__main__.py"
        for flag in re.findall(r"--([a-z-]+)", line.partition("[")[0]):
            assert re.search(rf"\b{flag.replace('-', '_')}\b", listed.read_text()), flag
    elif program.startswith("scripts/"):
        text = (ROOM / program).read_text()
        assert all(re.search(rf"\b{flag.replace('-', '_')}\b", text) for flag in re.findall(r"--([a-z-]+)", line))
    else:
        raise AssertionError(f"no rule for {line!r}")


def test_commands_are_found() -> None:
    commands = read_commands("README.md")
    assert "bash scripts/sample.sh" in commands and sum("run_sample.py" in line for line in commands) > 5
    assert "python -m voc12.prepare folder --root my_photos --val-share 0.2" in commands


@pytest.mark.slow
@pytest.mark.parametrize(("name", "line"), [(name, line) for name in DOCUMENTS for line in read_commands(name)])
def test_commands_of_documents(name: str, line: str) -> None:
    try:
        check_command(line)
    except SystemExit as error:
        raise AssertionError(f"{name}: {line}") from error


@pytest.mark.parametrize("line", [
    "python run_sample.py seam --no-such-flag 1", "python run_sample.py nothing",
    "python predict.py a.jpg --wheights b", "python -m scripts.nothing",
    "python -m pytest tests/test_nothing.py", "bash scripts/nothing.sh", "python scripts/nothing.py",
    "python scripts/look.py a.jpg --nothing b",
    "python -m voc12.prepare folder --rood my_photos", "python -m scripts.scale --no-such-flag 1",
])  # fmt: skip
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check_command(line)


def test_files_that_documents_name_exist() -> None:
    for name in DOCUMENTS:
        text = (ROOM / name).read_text()
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        paths = re.findall(r"`((?:docs|net|step|misc|voc12|scripts|tests)/[\w./]*\w)`", text)
        missing = [link for link in links if not ((ROOM / name).parent / link).exists()]
        missing += [path for path in paths if not (ROOM / path).exists()]
        assert missing == [], name


def test_the_readme_is_short_and_names_what_exists() -> None:
    text = (ROOM / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    registry.load_methods()
    rows = re.findall(r"^\| `(\w+)` \|.*\| `([\w.]+)(?:`, `([\w.]+))?(?: \w+)?` \|[^|]*\|$", text, re.M)
    assert len(rows) >= 10
    for method, *scripts in rows:
        assert method in registry.SEEDS
        assert all((ROOM / "scripts" / script).is_file() for script in scripts if script)


@pytest.mark.slow
def test_lines_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = make_set(tmp_path / "set"), tmp_path / "runs" / "seam-sample"
    assert run(data, out, "--masks", "truth", "--steps", "train_seg") == 0
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOM / "README.md").read_text(), re.M | re.S)
    names: dict[str, object] = {}
    capsys.readouterr()
    exec(code, names)
    mask = names["mask"]
    assert isinstance(mask, np.ndarray) and mask.shape == (40, 60) and mask.max() <= 2
    printed = eval(capsys.readouterr().out)
    assert list(printed)[0] == "background" and len(printed) == 3 and sum(printed.values()) == pytest.approx(1)


def test_fields_named_in_documents_are_of_the_recipe() -> None:
    """``aff.walk.alpha`` and the like, in backticks, are flags of some method."""
    registry.load_methods()
    configs = [default_config(method, "sample") for method in registry.SEEDS]
    text = "".join((ROOM / name).read_text() for name in DOCUMENTS)
    for field in set(re.findall(r"`((?:cam|aff|seg)\.(?:fit|network|label|walk|infer|augment)(?:\.\w+)+)`", text)):
        found = False
        for node in configs:
            for part in field.split("."):
                node = getattr(node, part, None) if dataclasses.is_dataclass(node) else None
            found |= node is not None
        assert found, field


def released_rows() -> list[list[str]]:
    """METHOD, PRESETS and FLAGS of the table of released files."""
    text = (ROOM / "docs" / "results.md").read_text()
    section = text[text.index("## Released files") : text.index("## Where the start files are")]
    cells = [[cell.strip() for cell in line.split("|")[3:5]] for line in section.splitlines() if line.startswith("| ")]
    return [[*(word.strip("` ") for word in names.split(",")), flags] for names, flags in cells if "`" in names]


def test_every_method_has_a_row_of_released_files() -> None:
    assert len(released_rows()) > 20
    assert {row[0] for row in released_rows()} >= set(registry.SEEDS) - {"more", "toco", "clipes", "weclip"}


@pytest.mark.slow
@pytest.mark.parametrize("row", released_rows(), ids=lambda row: "-".join(row[:2]))
def test_flags_of_released_files_are_understood(row: list[str]) -> None:
    method, *presets, flags = row
    words = [word for code in re.findall(r"`([^`]+)`", flags) for word in shlex.split(code) if code.startswith("--")]
    for preset in presets:
        config = parsing.parse([method, "--preset", preset, *words])
        assert words and config.preset == preset
