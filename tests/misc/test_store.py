"""Files: whole or not at all, nothing unpickled that could run code, readers that name what they cannot read."""

from __future__ import annotations

import errno
import os
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from misc.files import atomic, store
from misc.files.camfiles import read_cam, write_cam
from misc.files.ids import checked_id, read_ids
from misc.files.images import check_image, read_image, read_mask, write_mask
from misc.image.cam import Cam


class Hostile:
    """An object whose unpickling makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def picture(height: int = 20, width: int = 30) -> np.ndarray:
    """A smooth (H, W, 3) uint8 picture that JPEG keeps well."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 10, x * 8, 255 - x * 4 - y * 4], 2).astype(np.uint8)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


# ---------------------------------------------------------------------------------------------- writing


def test_a_file_whose_writing_fails_leaves_nothing_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with pytest.raises(RuntimeError), atomic.writing(path) as file:
        file.write(b"half")
        raise RuntimeError("in the middle")
    assert files(tmp_path) == []
    store.write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic.writing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert files(tmp_path) == ["file"] and path.read_bytes() == b"old"
    store.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def big() -> np.ndarray:
    return np.random.default_rng(0).random((700, 700))


WRITERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda path: store.write_bytes(path, big().tobytes()),
    "arrays": lambda path: store.write_arrays(path, a=big()),
    "weights": lambda path: store.write_weights(path, {"a": torch.from_numpy(big())}),
    "mask": lambda path: write_mask(path, (big() * 255).astype(np.uint8)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_reported_as_such_and_no_half_written_file_stays(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(atomic.DiskFull, match=r"No disk space left while writing .*here.*same command again"):
        WRITERS[kind](tmp_path / "here")
    assert files(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_that_is_really_full(kind: str, small_disk: Path) -> None:
    with pytest.raises(atomic.DiskFull, match=r"No disk space left while writing .*here"):
        WRITERS[kind](small_disk / "here")
    assert files(small_disk) == []


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "other"):
        store.write_arrays(tmp_path / f"{name}.npz", x=np.arange(5), y=np.ones((2, 3), np.float16))
        store.write_weights(tmp_path / f"{name}.pt", {"w": torch.arange(4.0), "n": {"step": 3}})
    for suffix in ("npz", "pt"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"other.{suffix}").read_bytes()


# ---------------------------------------------------------------------------------------------- ids and lists


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a\\b", "C:x", "a\0b"])
def test_an_id_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        checked_id(name)


def test_lists_hold_bare_ids_or_paths(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    text = "2007_000032\n\n/JPEGImages/2007_000039.jpg /SegmentationClass/2007_000039.png\na.b\n"
    path.write_text(text, encoding="utf-8-sig")
    assert read_ids(path) == ["2007_000032", "2007_000039", "a.b"]


BAD_LISTS = {
    "empty": (b"\n \n", "is empty: put one image id a line"),
    "climbing": (b"a\n../../etc/passwd\n", r"line 2: Image id '../../etc/passwd' is not allowed"),
    "twice": (b"a\nb\na\n", "names images twice: a. Remove"),
    "no text": (b"\xff\xfe\x00a", "cannot be read .*UTF-8"),
}


@pytest.mark.parametrize("content, told", BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_bad_list_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"list\.txt.*{told}"):
        read_ids(tmp_path / "list.txt")


# ---------------------------------------------------------------------------------------------- images and masks


def test_cmyk_grey_palette_and_alpha_images_become_rgb(tmp_path: Path) -> None:
    rgb = Image.fromarray(picture())
    for mode, suffix in (("CMYK", "jpg"), ("L", "jpg"), ("P", "png"), ("RGBA", "png"), ("LA", "png")):
        path = tmp_path / f"{mode}.{suffix}"
        rgb.convert(mode).save(path)
        read = read_image(path)
        assert read.shape == (20, 30, 3) and read.dtype == np.uint8
        wanted = picture() if mode in ("CMYK", "P", "RGBA") else np.array(rgb.convert("L").convert("RGB"))
        assert np.abs(read.astype(int) - wanted).mean() < 20, mode  # inverted or mixed channels are far more off


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_the_upper_eight(suffix: str, tmp_path: Path) -> None:
    values = (np.arange(600).reshape(20, 30) * 109).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    read = read_image(tmp_path / f"a.{suffix}")
    assert np.array_equal(read, np.repeat((values >> 8)[..., None], 3, axis=2))


def test_floating_point_pixels_are_refused_not_taken_for_black(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 5), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif cannot be read \(its pixels are floating-point numbers, save"):
        read_image(tmp_path / "a.tif")


def test_an_image_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(picture(), -1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_a_quick_look_finds_a_truncated_image(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture(200, 300)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-900])
    with pytest.raises(ValueError, match=rf"a\.{suffix} cannot be read .*replace it, or take it off the list"):
        check_image(path)
    path.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
        if suffix in ("jpg", "png", "webp"):
            check_image(path)
    path.write_bytes(whole + b"\0" * 20)  # as some cameras and archives do
    check_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image_is_named_with_a_remedy(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(picture(200, 300)).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} cannot be read .*replace it, or take it off the list"):
        read_image(path)
    with pytest.raises(FileNotFoundError, match="nowhere.jpg does not exist"):
        read_image(tmp_path / "nowhere.jpg")


def test_a_file_that_is_no_picture_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read \(cannot identify image file\): replace it"):
        read_image(tmp_path / "a.jpg")


def test_masks_keep_their_indices(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 20], [255, 3, 0]], np.uint8)
    write_mask(tmp_path / "mask.png", mask)
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)
    assert Image.open(tmp_path / "mask.png").mode == "P"
    Image.fromarray(mask).save(tmp_path / "grey.png")
    assert np.array_equal(read_mask(tmp_path / "grey.png"), mask)
    Image.fromarray(mask == 1).save(tmp_path / "bits.png")
    assert np.array_equal(read_mask(tmp_path / "bits.png"), mask == 1)


def test_a_colour_mask_is_refused_and_a_cut_one_named(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"colour\.png is a RGB image.*Convert it"):
        read_mask(tmp_path / "colour.png")
    write_mask(tmp_path / "cut.png", picture()[..., 0])
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read .*replace it"):
        read_mask(tmp_path / "cut.png")


# ---------------------------------------------------------------------------------------------- CAMs, weights, JSON


def test_cams_come_back_clipped_and_at_image_size(tmp_path: Path) -> None:
    maps = np.linspace(-0.5, 1.5, 2 * 3 * 4).reshape(2, 3, 4)
    write_cam(tmp_path / "a.npz", Cam(np.array([1, 4]), maps, (6, 8)))
    cam = read_cam(tmp_path / "a.npz")
    assert cam.keys.tolist() == [1, 4] and cam.size == (6, 8)
    assert np.allclose(cam.maps, maps.clip(0, 1), atol=1e-3) and cam.full_maps().shape == (2, 6, 8)
    write_cam(tmp_path / "none.npz", Cam(np.zeros(0, int), np.zeros((0, 6, 8)), (6, 8)))
    assert read_cam(tmp_path / "none.npz").full_maps().shape == (0, 6, 8)
    maps[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"nan\.npz is not written.*not finite"):
        write_cam(tmp_path / "nan.npz", Cam(np.array([1, 4]), maps, (6, 8)))
    assert not (tmp_path / "nan.npz").exists()


FOREIGN = {
    "dict": {3: np.full((4, 5), 0.5, np.float32), 1: np.full((4, 5), 0.25, ">f8")},
    "high_res": {"keys": np.array([1, 3]), "high_res": np.stack([np.full((4, 5), v) for v in (0.25, 0.5)])},
    "cam": {"key": [1, 3], "cam": np.asfortranarray(np.stack([np.full((4, 5), v) for v in (0.25, 0.5)]))},
    "with background": {
        "keys": np.array([0, 2, 4]), "cam": np.stack([np.full((4, 5), v) for v in (0.25, 0.5)]), "of": np.float32(1)
    },
}  # fmt: skip


@pytest.mark.parametrize("stored", FOREIGN.values(), ids=FOREIGN)
def test_cams_of_the_field_are_read(stored: dict[Any, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", stored)  # type: ignore[arg-type]
    cam = read_cam(tmp_path / "a.npy")
    assert cam.keys.tolist() == [1, 3] and cam.size == (4, 5)
    assert cam.maps.dtype == np.float32 and cam.maps[:, 0, 0].tolist() == [0.25, 0.5]


def test_no_reader_runs_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    np.save(tmp_path / "a.npy", {0: Hostile(mark)})  # type: ignore[arg-type]
    np.savez(tmp_path / "a.npz", keys=np.array([Hostile(mark)]))
    torch.save({"w": Hostile(mark)}, tmp_path / "a.pt")
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Hostile(mark)))
    readers = (("a.npy", read_cam), ("a.npz", read_cam), ("bare.npz", read_cam),
               ("a.pt", store.read_weights))  # fmt: skip
    for name, read in readers:
        with pytest.raises(ValueError, match=re.escape(name)) as told:
            read(tmp_path / name)
        assert "weights_only" not in str(told.value)  # no advice to read it unsafely
    assert not mark.exists()


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
@pytest.mark.parametrize("suffix", ["npz", "npy", "pt", "json"])
def test_a_file_cut_short_is_named_with_a_remedy(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{suffix}"
    write_cam(tmp_path / "cut.npz", Cam(np.array([0]), np.random.default_rng(0).random((1, 30, 40)), (30, 40)))
    np.save(tmp_path / "cut.npy", {0: np.zeros((4, 4))})  # type: ignore[arg-type]
    store.write_weights(tmp_path / "cut.pt", {"w": torch.zeros(50)})
    store.write_json(tmp_path / "cut.json", {"a": [1, 2]})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    read: Callable[[Path], Any] = {"pt": store.read_weights, "json": store.read_json}.get(suffix, read_cam)
    with pytest.raises(ValueError, match=rf"cut\.{suffix} cannot be read .*: .*(delete|replace) it"):
        read(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"cut\.{suffix} does not exist"):
        read(path)


@pytest.mark.filterwarnings("ignore")
def test_changed_bytes_never_give_another_error_than_one_that_names_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_cam(tmp_path / "a.npz", Cam(np.array([0, 2]), rng.random((2, 9, 9)), (9, 9)))
    np.save(tmp_path / "a.npy", {0: rng.random((4, 4)), 2: rng.random((4, 4)).astype("f4")})  # type: ignore[arg-type]
    store.write_weights(tmp_path / "a.pt", {"w": torch.zeros(5)})
    Image.fromarray(picture()).save(tmp_path / "a.png")
    readers: dict[str, Callable[[Path], Any]] = {
        "npz": read_cam, "npy": read_cam, "pt": store.read_weights, "png": read_image,
    }  # fmt: skip
    for suffix, read in readers.items():
        path = tmp_path / f"a.{suffix}"
        whole = path.read_bytes()
        for _ in range(150):
            changed = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 400), rng.integers(1, 5)):
                changed[place] = rng.integers(256)
            path.write_bytes(changed)
            try:
                read(path)
            except ValueError as error:
                assert str(path) in str(error)
