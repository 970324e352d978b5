"""Hostile exports of annotation tools, which ``prepare from`` reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.hostile.cases import ONE, Bench, Build, Data, HostileFile, Must, put
from scripts.hostile.formats import HOSTILE_VALUES, directory, json_paths, json_with, linked, pipe

FILES = {
    "coco": "_annotations.coco.json", "cvat": "annotations.xml", "labelme": f"{ONE}.json", "labelstudio": "tasks.json",
    "folders": f"first/{ONE}.jpg", "names": "classes.txt", "huggingface": "metadata.csv",
}  # fmt: skip
"""The file of a format that cases replace."""
_LONG = 10**400


def in_export(bench: Bench, form: str, data: Data, file: str = "") -> Build:
    """An export of two images; ``data`` takes the place of the format's file (or of ``file``)."""

    def build(cwd: Path) -> None:
        source = cwd / "export"
        if form == "folders":
            put(source / f"first/{ONE}.jpg", bench.photo)
            put(source / f"second/{ONE}.jpg", (bench.sample / "JPEGImages/2025_000002.jpg").read_bytes())
        elif form == "names":
            put(source / f"{ONE}[1 0].jpg", bench.photo)
            put(source / "2025_000002[0 1].jpg", bench.photo)
        else:
            put(source / f"{ONE}.jpg", bench.photo)
            shutil.copy(bench.sample / "JPEGImages/2025_000002.jpg", source)
        put(source / (file or FILES[form]), data)

    return build


def _case(
    bench: Bench, form: str, name: str, data: Data, must: Must = "refuse", victim: str | None = None, file: str = ""
) -> HostileFile:
    argv = ["from", form, "export", "--root", "made", "--workers", "0"]
    named = (file or FILES[form]) if victim is None else victim
    return HostileFile(f"from {form}", name, "prepare", argv, in_export(bench, form, data, file), must, named)


def good_documents(bench: Bench) -> dict[str, Any]:
    """JSON of an export, by format."""
    box = [float(v) for v in (2, 2, bench.width - 2, 2, bench.width - 2, bench.height - 2)]
    points = [box[n : n + 2] for n in (0, 2, 4)]
    return {
        "coco": {
            "images": [{"id": 1, "file_name": f"{ONE}.jpg", "height": bench.height, "width": bench.width}],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [box], "iscrowd": 0}],
        },
        "labelme": {
            "shapes": [{"label": "cat", "points": points, "shape_type": "polygon"}], "flags": {"dog": True},
            "imagePath": f"{ONE}.jpg", "imageHeight": bench.height, "imageWidth": bench.width,
        },
        "labelstudio": [
            {"data": {"image": f"{ONE}.jpg"},
             "annotations": [{"result": [{"type": "choices", "value": {"choices": ["cat", "dog"]}}]}]},
        ],
    }  # fmt: skip


def good_cvat(bench: Bench) -> str:
    """CVAT's annotations."""
    return (
        f'<annotations><image id="0" name="{ONE}.jpg" width="{bench.width}" height="{bench.height}">'
        '<polygon label="cat" points="0,0;15,0;15,20" /><mask label="dog" rle="2, 2" left="8" top="0" width="2" '
        'height="2" /><ellipse label="cat" cx="9" cy="9" rx="3" ry="2" /></image></annotations>'
    )


def _json_cases(bench: Bench) -> Iterator[HostileFile]:
    for form, content in good_documents(bench).items():
        paths = [path for path in json_paths(content) if path]
        for _ in range(12):
            path, new = bench.rng.choice(paths), bench.rng.choice(["DELETE", *HOSTILE_VALUES])
            name = f"{'/'.join(map(str, path))} = {str(new)[:20]!r}"
            yield _case(bench, form, name, json_with(content, path, new), "any", "")
    coco, labelme = good_documents(bench)["coco"], good_documents(bench)["labelme"]
    sides = {"height": 65535, "width": 65535}
    yield _case(bench, "coco", "65535 x 65535", json_with(coco, ("images", 0), {**coco["images"][0], **sides}),
                victim=ONE)  # fmt: skip
    counts = {"size": [bench.height, bench.width], "counts": [_LONG, 1]}
    yield _case(bench, "coco", "run length of 400 digits", json_with(coco, ("annotations", 0, "segmentation"), counts),
                victim=ONE)  # fmt: skip
    yield _case(bench, "labelme", "99 megapixels", json.dumps({**labelme, "imageHeight": 9000, "imageWidth": 11000})
                .encode(), victim=ONE)  # fmt: skip
    shape = {"label": "cat", "points": [[0, 0], [1, 1]], "shape_type": "mask", "mask": "AAAA"}
    yield _case(bench, "labelme", "mask of noise", json.dumps({**labelme, "shapes": [shape]}).encode())
    for form, key in (("coco", ("images", 0, "file_name")), ("labelme", ("imagePath",)),
                      ("labelstudio", (0, "data", "image"))):  # fmt: skip
        for written in ("../../../etc/passwd.jpg", "/etc/hostname.jpg", "a\0.jpg", f"{'x' * 5000}.jpg", "http://[a.jpg"):
            data = json_with(good_documents(bench)[form], key, written)
            yield _case(bench, form, f"image {written[:24]!r}", data, victim=FILES[form])


def _xml_cases(bench: Bench) -> Iterator[HostileFile]:
    xml = good_cvat(bench)
    for name, old, new in (
        ("run length of 400 digits", 'rle="2, 2"', f'rle="{_LONG}, 2"'),
        ("run length of 9000 digits", 'rle="2, 2"', f'rle="{"9" * 9000}"'),
        ("mask of 1.5 gigapixels", 'rle="2, 2" left="8" top="0" width="2" height="2"',
         'rle="1500000000" left="0" top="0" width="50000" height="30000"'),
        ("negative run lengths", 'rle="2, 2"', 'rle="8, -4"'),
        ("points of NaN", "15,0;15,20", "nan,0;15,20"),
        ("points of 1e300", "15,0;15,20", "1e300,0;15,20"),
        ("radius of infinity", 'rx="3"', 'rx="inf"'),
        ("image that climbs", f'name="{ONE}.jpg"', 'name="../../../etc/passwd.jpg"'),
        ("entities", "<annotations>", '<!DOCTYPE a [<!ENTITY b "c">]><annotations>'),
        ("deep", "<annotations>", "<annotations>" + "<a>" * 100000),
    ):  # fmt: skip
        yield _case(bench, "cvat", name, xml.replace(old, new, 1).encode())
    size = f'width="{bench.width}" height="{bench.height}"'
    yield _case(bench, "cvat", "size of another image", xml.replace(size, 'width="9000" height="9000"').encode(),
                victim=ONE)  # fmt: skip


def export_cases(bench: Bench) -> Iterator[HostileFile]:
    """Exports of every format: values of other kinds anywhere, claims of size, and what is no file in their place."""
    yield from _json_cases(bench)
    yield from _xml_cases(bench)
    heads = {"huggingface": "file_name,label\n", "labelstudio": "image,choice\n"}
    for form, head in heads.items():
        file = "metadata.csv" if form == "huggingface" else "tasks.csv"
        for name, line in {
            "climbing name": "../../../etc/passwd.jpg,cat\n", "no UTF-8": "\udcff.jpg,cat\n", "NUL": "a\0.jpg,cat\n",
            "number of 400 digits": f"{ONE}.jpg,{_LONG}\n", "class of 300 KB": f"{ONE}.jpg,{'y' * 300000}\n",
            "address that is none": "http://[a.jpg,cat\n", "300 classes": "".join(
                f"{ONE}.jpg,c{n}\n" for n in range(300)),
        }.items():  # fmt: skip
            data = (head + line).encode(errors="surrogateescape")
            yield _case(bench, form, name, data, victim=file, file=file)
    jsonl = json.dumps({"file_name": f"{ONE}.jpg", "label": _LONG}).encode()
    yield _case(bench, "huggingface", "JSON number of 400 digits", jsonl, file="metadata.jsonl")
    for name, text in {"300 classes": "\n".join(f"c{n}" for n in range(300)), "empty": "", "twice": "a\na\n"}.items():
        yield _case(bench, "names", name, text.encode())
    for form in FILES:
        for name, made in {"a pipe": pipe, "a folder": directory, "a link to /dev/zero": linked("/dev/zero")}.items():
            must: Must = "any" if form == "folders" and name == "a folder" else "refuse"
            yield _case(bench, form, name, made, must, "export")
