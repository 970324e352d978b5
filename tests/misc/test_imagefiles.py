"""Which images a command line means, and what their results are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from misc.files.ids import checked_id
from misc.files.imagefiles import find_images, safe_name, unread_pictures


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_files_folders_and_globs_are_found_once_and_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "a/2.JPG", "a/1.png", "a/deep/1.webp", "a/notes.txt", "b/x.y.gif")
    touch(tmp_path, "a/.hidden.jpg", "a/.cache/x.jpg")
    a, b = tmp_path / "a", tmp_path / "b"
    assert find_images([str(a)]) == {"1": a / "1.png", "2": a / "2.JPG", "deep/1": a / "deep/1.webp"}
    words = [str(b / "x.y.gif"), str(a), str(a / "1.*"), str(b)]
    assert list(find_images(words)) == ["x.y", "1", "2", "deep/1"]
    assert set(find_images([str(tmp_path / "**" / "*.*")])) == {"1.png", "1.webp", "2", "x.y"}
    assert find_images([str(a / "notes.txt"), "no where.jpg"]) == {
        "notes": a / "notes.txt", "no where": Path("no where.jpg"),  # reading them will report them
    }  # fmt: skip


def test_results_in_the_searched_folder_are_no_images(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "out/masks/1.png")
    assert list(find_images([str(tmp_path)], leave_out=tmp_path / "out")) == ["1"]
    assert list(find_images([str(tmp_path / "**/*.*g")], leave_out=tmp_path / "out")) == ["1"]
    touch(tmp_path, "masks/1.png")
    assert list(find_images([str(tmp_path)], leave_out=tmp_path)) == ["1"]


def test_names_that_would_meet_are_kept_apart_or_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/1.png", "b/1.png", "c:d.jpg", "c_d.png")
    assert set(find_images([str(tmp_path / "a")])) == {"1.jpg", "1.png"}
    assert set(find_images([str(tmp_path / "c*")])) == {"c_d.jpg", "c_d.png"}
    with pytest.raises(ValueError, match=r"a/1\.png and .*b/1\.png would both be written as 1\.png: give the folder"):
        find_images([str(tmp_path / "a" / "1.png"), str(tmp_path / "b" / "1.png")])
    assert set(find_images([str(tmp_path)])) == {"a/1.jpg", "a/1.png", "b/1", "c_d.jpg", "c_d.png"}


def test_pictures_that_are_passed_over_are_those_of_the_same_search(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.avif", "c.HEIC", "deep/d.psd", "e.eps", "film.mpg", "notes.txt", "out/f.heic")
    folder, out = str(tmp_path), tmp_path / "out"
    passed = [str(tmp_path / name) for name in ("b.avif", "c.HEIC", "deep/d.psd", "e.eps")]
    assert unread_pictures([folder, f"{folder}/", f"{folder}/deep"], leave_out=out) == passed
    assert unread_pictures([f"{folder}/*.*"]) == [passed[0], passed[1], passed[3]]
    assert unread_pictures([folder, passed[0]], leave_out=out) == passed[1:]  # a file that is named is not passed over
    assert list(find_images([folder, passed[0]], leave_out=out)) == ["a", "b"]


def test_no_image_at_all_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt")
    for words in ([str(tmp_path)], [str(tmp_path / "*.jpg")]):
        with pytest.raises(ValueError, match="There is no image in .*give files, folders or globs of .jpg"):
            find_images(words)


@pytest.mark.parametrize("name", ["a:b", "..", "a/../b", "C:\\x", "/x", ".", "a//b", "ä ö"])
def test_safe_names_are_ids(name: str) -> None:
    assert checked_id(safe_name(name)) == safe_name(name)
    assert safe_name("K\udcf6ter") == "K_ter"
