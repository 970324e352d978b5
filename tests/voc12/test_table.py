"""labels.csv in the forms that people write, and every fault of one named by its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from misc.files.ids import id_of_file
from voc12.table import Table, read_table
from voc12.tags import DataError

CLASSES = ("dog", "red box", "person")


def read(tmp_path: Path, text: str | bytes, classes: tuple[str, ...] | None = CLASSES) -> Table:
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(path, classes, id_of_file)


SAME = {
    "classes in a column": "file,classes\na.jpg,dog;red box\nb.jpg,\nc.jpg,person\n",
    "without a header": "a.jpg,dog;red box\nb.jpg,\nc.jpg,person\n",
    "a column a class": "file,dog,red box,person\na.jpg,1,1,0\nb.jpg,0,0,0\nc.jpg,0,0,1\n",
    "words for yes and no": "Image,dog,red box,person\na.jpg,x,YES,\nb.jpg,no,False,n\nc.jpg,,,true\n",
    "columns in another order": "file,person,red box,dog\na.jpg,0,1,1\nb.jpg,0,0,0\nc.jpg,1.0,0.0,0\n",
    "semicolons between columns": "file;dog;red box;person\na.jpg;1;1;0\nb.jpg;0;0;0\nc.jpg;0;0;1\n",
    "semicolons and quotes": 'file;classes\na.jpg;"dog;red box"\nb.jpg;\nc.jpg;person\n',
    "tabs": "file\tclasses\na.jpg\tdog;red box\nb.jpg\t\nc.jpg\tperson\n",
    "mark, Windows line ends": b"\xef\xbb\xbffile,classes\r\na.jpg,dog;red box\r\nb.jpg,\r\nc.jpg,person\r\n",
    "blank lines, spaces": "file,classes\n\na.jpg , dog ; red box ;\n,\nb.jpg,\n  \nc.jpg,person",
    "the same class twice": "file,classes\na.jpg,dog;red box;dog\nb.jpg,\nc.jpg,person\n",
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_every_way_of_writing_gives_the_same_tags(text: str | bytes, tmp_path: Path) -> None:
    table = read(tmp_path, text)
    assert table.classes == CLASSES and list(table.files.values()) == ["a.jpg", "b.jpg", "c.jpg"]
    assert {i: row.tolist() for i, row in table.tags.items()} == {"a": [1, 1, 0], "b": [0, 0, 0], "c": [0, 0, 1]}
    assert all(row.dtype == "float32" for row in table.tags.values())


def test_classes_that_are_not_given_are_those_that_occur(tmp_path: Path) -> None:
    table = read(tmp_path, "file,classes\na,zebra;ape\nb,ape\n", None)
    assert table.classes == ("ape", "zebra") and table.tags["b"].tolist() == [1, 0]
    assert read(tmp_path, "file,zebra,ape\na,0,0\n", None).classes == ("zebra", "ape")


def test_names_may_hold_commas_spaces_and_any_letters(tmp_path: Path) -> None:
    table = read(tmp_path, 'file,classes\n"dogs, all of them.jpg",dog\nGrößé 日本.png,person\n')
    assert list(table.tags) == ["dogs, all of them", "Größé 日本"]


WRONG = {
    "unknown class": ("file,classes\na,dog\nb,dgo\n", r"line 3: 'dgo' is no class \(is it 'dog'\?\)\. Correct it, or"),
    "unknown column": ("file,dog,cat\na,0,1\n", "the column 'cat' is no class"),
    "duplicate": ("a.jpg,dog\nb.jpg,dog\na.png,dog\n", "line 3: image 'a' comes twice"),
    "columns": ("file,classes\na,dog,person\n", "line 2 has 3 columns: write file,class1;class2"),
    "cells": ("file,dog,person\na,1\n", "line 2 has 2 columns, the header has 3"),
    "half": ("file,dog,person\na,0.5,0\n", "line 2, column 'dog': '0.5' is neither 1 nor 0"),
    "no image": ("file,classes\n,dog\n", "line 2 names no image"),
    "empty": ("\n\n", "is empty: write one line an image"),
    "Latin-1": ("file,classes\nä.jpg,dog\n".encode("latin-1"), "is not in UTF-8"),
    "UTF-16": ("file,classes\na.jpg,dog\n".encode("utf-16"), "is not in UTF-8"),
    "column twice": ("file,dog,dog\na,0,0\n", "column 3: class 'dog' comes twice"),
}


@pytest.mark.parametrize("text, told", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_reported(text: str | bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told) as error:
        read(tmp_path, text)
    assert "labels.csv" in str(error.value)


def test_classes_of_a_table_without_any_tag_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no class at all"):
        read(tmp_path, "file,classes\na,\n", None)


def test_all_faults_come_at_once_the_first_ten_by_line(tmp_path: Path) -> None:
    lines = ["file,classes", *(f"{i},cow" for i in range(13)), "last,dog,dog"]
    with pytest.raises(DataError) as error:
        read(tmp_path, "\n".join(lines))
    text = str(error.value)
    assert "line 2: 'cow'" in text and "line 11: 'cow'" in text and "line 12" not in text and "4 more lines" in text
