"""Hostile COCO annotations and SBD masks."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

from scripts.hostile.cases import THIRD, Bench, Data, HostileFile, Must
from scripts.hostile.formats import HOSTILE_VALUES, json_paths, json_with, later, pickled_code

FILE = "instances_train2014.json"


def _coco(bench: Bench, name: str, data: Data, must: Must = "refuse", victim: str = FILE) -> HostileFile:
    return HostileFile("COCO", name, "prepare", bench.prepare_coco, bench.in_coco(data), must, victim)


def coco_cases(bench: Bench) -> Iterator[HostileFile]:
    """COCO's JSON: wrong types anywhere, hostile segmentations and images."""
    coco, rng = json.loads(bench.coco_file), bench.rng
    paths = list(json_paths(coco))
    for which in range(36):
        path = rng.choice([p for p in paths if len(p) > 1] if which else paths)
        new = rng.choice(["DELETE", *HOSTILE_VALUES])
        name = f"{'/'.join(map(str, path))} = {str(new)[:20]!r}"
        yield _coco(bench, name, json_with(coco, path, new), "any")

    size = {"size": [bench.height, bench.width]}
    noise = "".join(chr(rng.randrange(33, 127)) for _ in range(60))
    segmentations: list[tuple[str, Any, Must]] = [
        ("polygon to 1e9", [[0, 0, 1e9, 0, 1e9, 1e9]], "any"),
        ("polygon with NaN", [[0, 0, float("nan"), 3, 5, 5]], "any"),
        ("polygon of 1e300", [[0, 0, 1e300, 0, 5, 5]], "any"),
        ("polygon of texts", [["a", "b", "c", "d", "e", "f"]], "refuse"),
        ("polygon of 4 values", [[1, 2, 3, 4]], "refuse"),
        ("a million points", [[float(i % 90) for i in range(2_000_000)]], "any"),
        ("run lengths too long", {**size, "counts": [0, 10**9]}, "refuse"),
        ("run lengths negative", {**size, "counts": [5, -5, 10]}, "refuse"),
        ("run lengths too short", {**size, "counts": [1, 2]}, "refuse"),
        ("run lengths of texts", {**size, "counts": ["a"]}, "refuse"),
        ("run lengths 2^40", {**size, "counts": [2**40, 1]}, "refuse"),
        ("coded counts of noise", {**size, "counts": noise}, "any"),
        ("coded counts of ooooo", {**size, "counts": "oooooooooooooooooooo"}, "any"),
        ("coded counts not ASCII", {**size, "counts": "\u00e4\u20ac\u4e00"}, "any"),
        ("coded counts empty", {**size, "counts": ""}, "any"),
        ("counts missing", size, "refuse"),
        ("a number", 7, "refuse"),
        ("size of another image", {"size": [3, 3], "counts": [9]}, "refuse"),
        ("a million run lengths", {**size, "counts": [1] * 1_000_000}, "refuse"),
    ]
    victim = str(coco["annotations"][0]["id"])
    for name, value, must in segmentations:
        data = json_with(coco, ("annotations", 0, "segmentation"), value)
        yield _coco(bench, f"segmentation: {name}", data, must, victim)

    images: list[tuple[str, dict[str, Any]]] = [
        ("height 1e9", {"height": 10**9, "width": 10**9}),
        ("height 20000 x 20000", {"height": 20000, "width": 20000}),
        ("negative height", {"height": -5}),
        ("height 0", {"height": 0}),
        ("file name climbs", {"file_name": "../../../../tmp/evil.jpg"}),
        ("file name ..", {"file_name": ".."}),
        ("file name empty", {"file_name": ""}),
        ("file name with NUL", {"file_name": "a\0.jpg"}),
        ("file name of 5000 letters", {"file_name": "x" * 5000 + ".jpg"}),
        ("file name a number", {"file_name": 7}),
        ("id a list", {"id": [1]}),
        ("id a text", {"id": "1"}),
        ("file name with newline", {"file_name": "a\nb.jpg"}),
    ]
    for name, changes in images:
        data = json_with(coco, ("images", 0), {**coco["images"][0], **changes})
        yield _coco(bench, f"image: {name}", data, "refuse", "")

    empty: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    many = {**empty, "categories": [{"id": i, "name": f"c{i}"} for i in range(300)]}
    whole: list[tuple[str, bytes]] = [
        ("100000 brackets", b"[" * 100000),
        ("not UTF-8", b"\xff\xfe{}"),
        ("a list", b"[]"),
        ("a number of 100000 digits", b'{"images": ' + b"9" * 100000 + b"}"),
        ("captions", json.dumps({**empty, "annotations": [{"caption": "x"}]}).encode()),
        ("300 categories", json.dumps(many).encode()),
        ("categories are numbers", json.dumps({**coco, "categories": [1, 2]}).encode()),
        ("category names are numbers",
         json.dumps({**coco, "categories": [{"id": 1, "name": 1}, {"id": 4, "name": 2}]}).encode()),
        ("annotations are texts", json.dumps({**coco, "annotations": ["a"]}).encode()),
    ]  # fmt: skip
    for name, content in whole:
        yield _coco(bench, name, content)


def sbd_map(bench: Bench) -> np.ndarray:
    """The mask of the image THIRD as SBD holds it, without 255."""
    mask = np.array(Image.open(bench.sample / "SegmentationClass" / f"{THIRD}.png"))
    mask[mask == 255] = 0
    return mask


def mat(compress: bool = False, **content: Any) -> bytes:
    """A MATLAB 5 file."""
    out = io.BytesIO()
    scipy.io.savemat(out, content, do_compression=compress)
    return out.getvalue()


def sbd(segmentation: Any, compress: bool = False) -> bytes:
    """A file of SBD with this as its mask."""
    return mat(compress, GTcls={"Segmentation": segmentation})


def sbd_cases(bench: Bench) -> Iterator[HostileFile]:
    """Masks of SBD, in MATLAB's format."""
    third = sbd_map(bench)
    good, shape = sbd(third), struct.pack("<ii", *third.shape)
    nested: dict[str, Any] = {"Segmentation": third}
    for _ in range(25):
        nested = {"x": nested}
    hdf = b"MATLAB 7.3 MAT-file" + b" " * 105 + b"\0\2IM" + b"\x89HDF\r\n\x1a\n" + bytes(500)
    rows: list[tuple[str, Data, Must]] = [
        ("floats with NaN", sbd(np.where(third == 0, np.nan, third.astype(float))), "refuse"),
        ("infinite", sbd(np.full(third.shape, np.inf)), "refuse"),
        ("fractions", sbd(third + 0.5), "refuse"),
        ("negative", sbd(third.astype(np.int16) - 5), "refuse"),
        ("value 250", sbd(third + 250), "refuse"),
        ("three dimensions", sbd(np.dstack([third] * 3)), "refuse"),
        ("other size", sbd(third[:-2]), "refuse"),
        ("texts", sbd("hello"), "refuse"),
        ("cells", sbd(np.array([[1, "a"]], dtype=object)), "refuse"),
        ("complex", sbd(third * 1j), "refuse"),
        ("no GTcls", mat(x=third), "refuse"),
        ("GTcls a number", mat(GTcls=7), "refuse"),
        ("empty map", sbd(np.zeros((0, 0))), "refuse"),
        ("a bomb of 400 MB", later(lambda: sbd(np.zeros((20000, 20000), np.uint8), compress=True)), "refuse"),
        ("dimensions 2^31", good.replace(shape, struct.pack("<ii", 2**31 - 1, 2**31 - 1)), "refuse"),
        ("dimensions negative", good.replace(shape, struct.pack("<ii", -1, -1)), "refuse"),
        ("MATLAB 7.3", hdf, "refuse"),
        ("a pickle", pickled_code(), "refuse"),
        ("nested structs", mat(GTcls=nested), "any"),
    ]
    for name, data, must in rows:
        build = bench.in_voc(f"sbd/cls/{THIRD}.mat", data)
        yield HostileFile("SBD", name, "prepare", bench.prepare_voc, build, must, THIRD, heavy="bomb" in name)
