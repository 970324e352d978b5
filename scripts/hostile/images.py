"""Hostile images, masks and file names."""

from __future__ import annotations

import csv
import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.hostile.cases import ONE, USUAL_LIMIT, Bench, Build, Data, HostileFile, Must
from scripts.hostile.formats import (
    MARKER,
    directory,
    encoded,
    flipped,
    later,
    linked,
    other_pixels,
    patched,
    pipe,
    png,
    png_chunk,
)  # fmt: skip

_EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n"
    + f"(touch {MARKER}) (w) file\n%pipe%touch {MARKER}\n".encode()
)
_NAMES: dict[str, str | bytes] = {
    "newline": "a\nb.jpg", "control characters": "a\x1b[31m\x07.jpg", "not UTF-8": b"a\xff\xfe.jpg",
    "230 letters": "x" * 230 + ".jpg", "250 letters": "x" * 250 + ".jpg", "leading dash": "--help.jpg",
    "quote and comma": 'a",b;c.jpg', "right to left": "\u202egpj.a.jpg", "spaces at the end": "a .jpg",
    "only dots": "....jpg", "a glob": "[a]*?.jpg", "colon": "c:x.jpg", "backslash": "a\\..\\b.jpg",
}  # fmt: skip


def original_images(bench: Bench) -> dict[str, bytes]:
    """One photo in every format: {suffix: file}."""
    pixels = bench.pixels
    return {
        "jpg": bench.photo, "png": encoded(pixels, "PNG"), "gif": encoded(pixels.convert("P"), "GIF"),
        "tif": encoded(pixels, "TIFF", compression="tiff_lzw"), "webp": encoded(pixels, "WEBP"),
        "bmp": encoded(pixels, "BMP"),
    }  # fmt: skip


def image_in_folder(bench: Bench, suffix: str, data: Data) -> Build:
    """The photo ONE of a folder in another format."""

    def rename(root: Path) -> None:
        table = root / "labels.csv"
        table.write_text(table.read_text().replace(f"{ONE}.jpg", f"{ONE}.{suffix}"))

    remove = f"images/{ONE}.jpg" if suffix != "jpg" else ""
    return bench.in_folder(f"images/{ONE}.{suffix}", data, remove=remove, edit=rename)


def _exif(count: int, offset: int, last: int) -> bytes:
    entry = struct.pack(">HHHII", 1, 0x0112, 3 if count == 1 else 2, count, offset)
    body = b"Exif\0\0MM\0*\0\0\0\x08" + entry + struct.pack(">I", last)
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def _tiff_with(data: bytes, changes: dict[int, int]) -> bytes:
    """A TIFF with other values of its tags."""
    out = bytearray(data)
    (at,) = struct.unpack_from("<I", data, 4)
    for n in range(struct.unpack_from("<H", data, at)[0]):
        place = at + 2 + 12 * n
        code, kind = struct.unpack_from("<HH", data, place)
        if code in changes:
            struct.pack_into("<H" if kind == 3 else "<I", out, place + 8, changes[code])
    return bytes(out)


def image_cases(bench: Bench) -> Iterator[HostileFile]:
    """Photos, each read by prepare and by predict.py."""
    originals = original_images(bench)
    photo, gif, tif, photo_png = (originals[s] for s in ("jpg", "gif", "tif", "png"))
    sof = next(i for i in range(len(photo)) if photo[i : i + 2] in (b"\xff\xc0", b"\xff\xc2")) + 5
    idat = photo_png.index(b"IDAT")
    frame = gif.index(b"\x2c", 13 + 3 * 2 ** ((gif[10] & 7) + 1)) + 1
    first = struct.unpack_from("<I", tif, 4)[0]
    end = first + 2 + 12 * struct.unpack_from("<H", tif, first)[0]
    nan = Image.fromarray(np.full((20, 20), np.nan, np.float32))

    def text_bomb(kind: bytes) -> Callable[[Path], None]:
        body = b"k\0\0"
        return later(lambda: png(2, 2, b"\0ab\0cd", extra=png_chunk(kind, body + zlib.compress(bytes(300 << 20), 9))))

    table: list[tuple[str, str, Data, Must]] = [
        ("jpg", "header says 65500 x 65500", patched(photo, sof, struct.pack(">HH", 65500, 65500)), "refuse"),
        ("jpg", "header says 0 x 0", patched(photo, sof, struct.pack(">HH", 0, 0)), "refuse"),
        ("jpg", "header says 9000 x 9000, little data", patched(photo, sof, struct.pack(">HH", 9000, 9000)), "any"),
        ("jpg", "cut in half", photo[: len(photo) // 2], "refuse"),
        ("jpg", "EXIF orientation 99, directory loops", photo[:2] + _exif(1, 99 << 16, 8) + photo[2:], "any"),
        ("jpg", "EXIF orientation a text of 4 GB", photo[:2] + _exif(0xFFFFFFF0, 0x7FFFFFFF, 0) + photo[2:], "any"),
        ("jpg", "a link to /dev/zero", linked("/dev/zero"), "refuse"),
        ("jpg", "a link to /etc/hostname", linked("/etc/hostname"), "refuse"),
        ("jpg", "a link to itself", linked("."), "refuse"),
        ("jpg", "a named pipe", pipe, "refuse"),
        ("jpg", "a folder", directory, "any"),
        ("jpg", "PostScript under a JPEG's name", _EPS, "refuse"),
        ("png", "header says 2^31-1 squared", png(2**31 - 1, 2**31 - 1, b"\0" * 100), "refuse"),
        ("png", "header says 60000 x 60000", png(60000, 60000, b"\0" * 1000), "refuse"),
        ("png", "13300 x 13300, all black", later(lambda: png(13300, 13300, bytes(13301 * 13300))), "refuse"),
        ("png", "9000 x 9000, all black", later(lambda: png(9000, 9000, bytes(9001 * 9000))), "any"),
        ("png", "1 x 60000", png(1, 60000, b"\0\0" * 60000), "any"),
        ("png", "60000 x 1", png(60000, 1, b"\0" + bytes(60000)), "any"),
        ("png", "1 x 1", png(1, 1, b"\0\x80"), "any"),
        ("png", "compressed text of 300 MB", text_bomb(b"zTXt"), "any"),
        ("png", "colour profile of 300 MB", text_bomb(b"iCCP"), "any"),
        ("png", "data flipped", flipped(photo_png, idat + 2000), "refuse"),
        ("png", "chunk length wrong", patched(photo_png, idat - 4, struct.pack(">I", 2**31 - 2)), "refuse"),
        ("png", "palette without a palette", png(4, 4, b"\0\1\2\3\4" * 4, colour=3), "any"),
        ("png", "16-bit colour with alpha", png(4, 4, (b"\0" + bytes(range(32))) * 4, depth=16, colour=6), "any"),
        ("png", "bit depth 7", png(4, 4, b"\0" * 40, depth=7), "refuse"),
        ("gif", "header says 65535 x 65535", patched(gif, 6, struct.pack("<HH", 65535, 65535)), "any"),
        ("gif", "frame outside the picture", patched(gif, frame, struct.pack("<HHHH", 60000, 60000, 3, 3)), "any"),
        ("tif", "header says 65000 x 65000", _tiff_with(tif, {256: 65000, 257: 65000}), "refuse"),
        ("tif", "strips outside the file", _tiff_with(tif, {273: 0x7FFFFFFF}), "any"),
        ("tif", "100 bits a sample", _tiff_with(tif, {258: 100}), "any"),
        ("tif", "directory is itself its next", patched(tif, end, tif[4:8]), "any"),
        ("tif", "floating-point pixels with NaN", encoded(nan, "TIFF"), "refuse"),
    ]  # fmt: skip
    for suffix, name, data, must in table:
        large = "000 x " in name or "MB" in name
        limit = 60 if large else USUAL_LIMIT
        yield HostileFile(f"image {suffix}", f"{name} (prepare)", "prepare", bench.prepare_folder,
                   image_in_folder(bench, suffix, data), must, ONE, limit, large)  # fmt: skip
        yield HostileFile(f"image {suffix}", f"{name} (predict)", "predict.py", bench.predict,
                   bench.in_predict(f"{ONE}.{suffix}", data), must, ONE, limit, large)  # fmt: skip


def _all_listed(cwd: Path) -> str:
    count = len(list((cwd / "photos/images").glob("*.jpg")))
    lists = (cwd / "photos/splits").glob("*.txt")
    lines = [line for path in lists for line in path.read_text(errors="replace").split("\n") if line]
    fine = len(lines) == count and max(Counter(lines).values()) == 1
    return "" if fine else f"splits hold {len(lines)} lines for {count} images"


def name_cases(bench: Bench) -> Iterator[HostileFile]:
    """Photos of odd names."""
    for label, file in _NAMES.items():

        def named(path: Path, file: str | bytes = file) -> None:
            target = os.path.join(os.fsencode(path.parent), file if isinstance(file, bytes) else file.encode())
            with open(target, "wb") as handle:
                handle.write(bench.photo)

        def listed(root: Path, file: str | bytes = file) -> None:
            if isinstance(file, str):
                with open(root / "labels.csv", "a", newline="") as handle:
                    csv.writer(handle).writerow([file, bench.tag])

        build = bench.in_folder("images/.keep", named, masks=False, edit=listed)
        must: Must = "any" if isinstance(file, bytes) else _all_listed
        argv = [*bench.prepare_folder, "--val-share", "0.3"]
        yield HostileFile("file name", f"{label} (prepare, lists)", "prepare", argv, build, must)
        build = bench.in_predict("k.jpg", named)
        yield HostileFile("file name", f"{label} (predict)", "predict.py", bench.predict, build)


def mask_cases(bench: Bench) -> Iterator[HostileFile]:
    """Masks as ground truth of a folder, as truth of evaluation.py and as pseudo masks of a run."""
    data, mask = bench.mask_file, bench.mask
    idat, end = data.index(b"IDAT"), data.index(b"IEND")

    def image(array: np.ndarray, kind: str = "PNG") -> bytes:
        return encoded(Image.fromarray(array), kind)

    table: list[tuple[str, Data, str]] = [
        ("data flipped", flipped(data, idat + 40), "same"),
        ("last data bytes flipped", flipped(data, end - 14, 0xFF), "same"),
        ("IDAT's checksum wrong", patched(data, end - 8, b"\0\0\0\0"), "same"),
        ("cut in half", data[: len(data) // 2], "refuse"),
        ("colour", encoded(bench.pixels, "PNG"), "refuse"),
        ("16 bit", image(mask.astype(np.uint16) * 257), "refuse"),
        ("other size", image(mask[:-3]), "refuse"),
        ("value 77", image(np.where(mask == 0, 77, mask).astype(np.uint8)), "refuse"),
        ("13300 x 13300", later(lambda: png(13300, 13300, bytes(13301 * 13300))), "refuse"),
        ("four channels with alpha", image(np.dstack([mask] * 4)), "refuse"),
        ("a JPEG under its name", image(mask, "JPEG"), "any"),
        ("empty", b"", "refuse"),
        ("2 x 2 header over the data", png(2, 2, b"\0\0\0\0\0\0"), "refuse"),
    ]
    places = [
        ("prepare", "prepare", bench.prepare_folder, "photos/masks"),
        ("evaluation, truth", "evaluation.py", bench.evaluate_masks, "d/SegmentationClass"),
        ("run, train_seg", "run_sample.py", [*bench.run, "--steps", "train_seg"], "run/label"),
    ]
    for label, content, wanted in table:
        for place, script, argv, folder in places:
            if script == "run_sample.py" and wanted == "any":
                continue
            file = f"{folder}/{ONE}.png"
            must: Must = partial(_same_pixels, file=file, original=data) if wanted == "same" else wanted  # type: ignore[assignment]
            build = {
                "prepare": lambda: bench.in_folder(f"masks/{ONE}.png", content),  # noqa: B023
                "evaluation.py": lambda: bench.in_evaluation(file, content),  # noqa: B023
                "run_sample.py": lambda: bench.in_run(f"label/{ONE}.png", content, "train_seg"),  # noqa: B023
            }[script]()
            if script == "run_sample.py" and wanted == "same":
                must = "any"
            yield HostileFile("mask", f"{label} ({place})", script, argv, build, must, ONE, heavy="13300" in label)


def _same_pixels(cwd: Path, file: str, original: bytes) -> str:
    return other_pixels(cwd / file, original)
