"""texts.csv: what classes are called in words, and what is refused by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from voc12.tags import DataError, read_texts

CLASSES = ("tvmonitor", "potted_plant", "T\u00fcr")


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "texts.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize("line", ["T\u00fcr", "Tu\u0308r"])
def test_words_by_class(line: str, tmp_path: Path) -> None:
    content = f'\ufefftvmonitor, tvmonitor screen \r\n\r\n{line},"door,gate, house"\r\n'
    found = read_texts(written(tmp_path, content), CLASSES)
    assert found == {"tvmonitor": "tvmonitor screen", "T\u00fcr": "door,gate, house"}
    # commas without quotes are part of the words
    assert read_texts(written(tmp_path, "potted_plant,plant,pot\n"), CLASSES) == {"potted_plant": "plant,pot"}
    assert read_texts(written(tmp_path, ""), CLASSES) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dog,hound\n", "line 1: 'dog' is no class; there are: tvmonitor, potted_plant"),
        ("tvmonitor,a\ntvmonitor,b\n", "line 2: 'tvmonitor' is there twice"),
        ("tvmonitor\n", "line 1: 'tvmonitor' has no words"),
        ("tvmonitor, \n", "line 1: 'tvmonitor' has no words"),
        ("class,words\ntvmonitor,a\n", "line 1: 'class' is no class"),
        ("tvmonitor,T\u00fcr\n".encode("latin-1"), "can't be read"),
        ("tvmonitor,a\n".encode("utf-16"), "can't be read"),
        ("tvmonitor,a\0b\n", "NUL"),
        ("tvmonitor," + "x" * (1 << 21), "more than"),
    ],
)
def test_damaged_ones_are_refused_by_file_and_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as found:
        read_texts(written(tmp_path, content), CLASSES)
    assert "texts.csv" in str(found.value) and message in str(found.value)


def test_no_file_and_no_plain_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="texts.csv does not exist: write lines"):
        read_texts(tmp_path / "texts.csv", CLASSES)
    (tmp_path / "texts.csv").mkdir()
    with pytest.raises(DataError, match="texts.csv"):
        read_texts(tmp_path / "texts.csv", CLASSES)
