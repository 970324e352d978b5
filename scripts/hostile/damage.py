"""Damaged bytes of every kind of file that is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

from scripts.hostile import annotations, checkpoints, exports, images, maps, texts
from scripts.hostile.cases import ONE, THIRD, Bench, Build, HostileFile, Must
from scripts.hostile.formats import mutate, npy, other_pixels

UNNOTICED = ("append", "repeat", "flip1", "zero", "ff", "garbage", "delete", "swap")
"""Damage that formats with checksums may not notice: what is added after the end, or falls into unused bytes."""


def _kinds(bench: Bench) -> Iterator[tuple[HostileFile, bytes, Callable[[bytes], Build]]]:
    """A case (with must "refuse" where checksums tell damage), an original file, and what lays a damaged one."""

    def same(place: str, original: bytes) -> Must:
        return lambda cwd: other_pixels(cwd / place, original)

    def kind(
        name: str, data: bytes, script: str, argv: list[str], lay: Callable[[bytes], Build], must: Must = "any",
        victim: str = ONE,
    ) -> tuple[HostileFile, bytes, Callable[[bytes], Build]]:  # fmt: skip
        return HostileFile(name, "", script, argv, lay(data), must, victim), data, lay

    folder, prepare = bench.in_folder, bench.prepare_folder
    for suffix, data in images.original_images(bench).items():
        def photo(x: bytes, s: str = suffix) -> Build:
            return images.image_in_folder(bench, s, x)

        def new(x: bytes, s: str = suffix) -> Build:
            return bench.in_predict(f"{ONE}.{s}", x)

        must: Must = same(f"photos/images/{ONE}.png", data) if suffix == "png" else "any"
        yield kind(f"image {suffix}", data, "prepare", prepare, photo, must)
        must = same(f"in/{ONE}.png", data) if suffix == "png" else "any"
        yield kind(f"image {suffix}", data, "predict.py", bench.predict, new, must)

    mask = bench.mask_file
    yield kind("mask", mask, "prepare", prepare, lambda x: folder(f"masks/{ONE}.png", x),
               same(f"photos/masks/{ONE}.png", mask))  # fmt: skip
    yield kind("mask", mask, "evaluation.py", bench.evaluate_masks,
               lambda x: bench.in_evaluation(f"d/SegmentationClass/{ONE}.png", x),
               same(f"d/SegmentationClass/{ONE}.png", mask))  # fmt: skip
    for file, text in {"labels.csv": texts.good_table(bench), "classes.txt": "\n".join(bench.names)}.items():
        yield kind(file, text.encode(), "prepare", prepare, lambda x, f=file: folder(f, x), victim=file)  # type: ignore[misc]
    lists = "ImageSets/Segmentation/train.txt"
    yield kind("list", (bench.sample / lists).read_bytes(), "evaluation.py", bench.evaluate_masks,
               lambda x: bench.in_evaluation(f"d/{lists}", x), victim="")  # fmt: skip
    yield kind("XML", texts.good_xml(bench).encode(), "prepare", bench.prepare_voc,
               lambda x: bench.in_voc(f"voc/Annotations/{ONE}.xml", x))  # fmt: skip
    yield kind("COCO", bench.coco_file, "prepare", bench.prepare_coco, bench.in_coco, victim="")
    yield kind("SBD", annotations.sbd(annotations.sbd_map(bench)), "prepare", bench.prepare_voc,
               lambda x: bench.in_voc(f"sbd/cls/{THIRD}.mat", x), victim=THIRD)  # fmt: skip

    documents = {form: json.dumps(content).encode() for form, content in exports.good_documents(bench).items()}
    for form, data in {**documents, "cvat": exports.good_cvat(bench).encode()}.items():
        argv = ["from", form, "export", "--root", "made", "--workers", "0"]
        yield kind(f"from {form}", data, "prepare", argv,
                   lambda x, f=form: exports.in_export(bench, f, x), victim="")  # type: ignore[misc]  # fmt: skip

    cam = bench.made(f"cam/{ONE}.npz")
    yield kind("maps npz", cam, "evaluation.py", bench.evaluate_maps,
               lambda x: bench.in_evaluation(f"cam/{ONE}.npz", x), "refuse")  # fmt: skip
    yield kind("maps npz", cam, "run_sample.py", [*bench.run, "--steps", "3"],
               lambda x: bench.in_run(f"cam/{ONE}.npz", x, "make_aff_label"), "refuse")  # fmt: skip
    yield kind("maps npy", npy({0: maps.full_maps(bench)}), "evaluation.py",
               ["npy" if word == "npz" else word for word in bench.evaluate_maps],
               lambda x: maps.npy_in_evaluation(bench, x))  # fmt: skip
    yield kind("weights", bench.made("weights/seg.pt"), "predict.py", bench.predict,
               lambda x: bench.in_predict(f"{ONE}.jpg", bench.photo, x), "refuse", "seg.pt")  # fmt: skip
    for file in ("run.json", "scores.json"):
        yield kind(file, bench.made(file), "run_sample.py", bench.run,
                   lambda x, f=file: bench.in_run(f, x, "report"), victim=file)  # type: ignore[misc]  # fmt: skip
    for suffix, data, flags in (
        ("pt", bench.made("weights/cam.pt"), []),
        ("params", checkpoints.mxnet(), []),
        ("caffemodel", checkpoints.caffe(), checkpoints.VGG_FLAGS),
    ):
        yield kind(f".{suffix}", data, "run_sample.py", [*bench.start, *flags, "--cam.weights", f"w.{suffix}"],
                   lambda x, s=suffix: bench.in_start(f"w.{s}", x), victim=f"w.{suffix}")  # type: ignore[misc]  # fmt: skip


def damaged_cases(bench: Bench, count: int) -> Iterator[HostileFile]:
    """``count`` damaged files, of all kinds in turn."""
    kinds = list(_kinds(bench))
    made = 0
    while made < count:
        case, data, lay = kinds[made % len(kinds)]
        how, damaged = mutate(data, bench.rng)
        if damaged == data:
            continue
        must: Must = "any" if case.must == "refuse" and how in UNNOTICED else case.must
        yield replace(case, name=f"damaged: {how} #{made}", build=lay(damaged), must=must)
        made += 1


