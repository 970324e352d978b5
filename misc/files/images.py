"""Reading and writing of image and mask files."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps

from misc.files.labelmap import read_labelmap
from misc.files.store import reading, write_bytes
from misc.image.draw import palette

LARGEST_MEGAPIXELS = 100
"""Larger images are refused: their masks and maps would take gigabytes."""

Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is replaced by ours, which its reader can choose
_DEPTHS = (8, 10, 12, 14, 16)
"""Bits that cameras and scanners fill of a 16-bit number."""


@contextmanager
def _opened(path: Path, largest: float) -> Iterator[tuple[Image.Image, bytes]]:
    """An image file, opened and loaded, and its bytes; ValueError for one of more megapixels, no file, a PNG whose
    checksums are wrong (a damaged one can decode to other pixels)."""
    data = Path(path).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        _check_head(image, largest)
        if image.format == "PNG":
            _check_png(data)
        image.load()
        yield image, data


def _check_head(image: Image.Image, largest: float) -> None:
    """ValueError for more megapixels, and for PostScript: it is a program, which Pillow would let Ghostscript run."""
    if image.format == "EPS":
        raise ValueError("it is PostScript, which is not read: save it as PNG")
    megapixels = image.size[0] * image.size[1] / 1e6
    if megapixels > largest:
        raise ValueError(
            f"it has {megapixels:.0f} megapixels, more than {largest:g}: make a smaller copy by python -m "
            "voc12.prepare shrink"
        )


def _check_png(data: bytes) -> None:
    at, kind = 8, b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise ValueError("the file ends too early")
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = memoryview(data)[at + 4 : at + 8 + length]
        if zlib.crc32(body) != int.from_bytes(data[at + 8 + length : at + 12 + length], "big"):
            raise ValueError(f"the checksum of its part {kind!r} is wrong")
        at += 12 + length


def read_image(path: Path, largest: float = LARGEST_MEGAPIXELS) -> np.ndarray:
    """(H, W, 3) uint8 RGB of any image file that Pillow reads, rotated as its EXIF orientation says.

    Grey, palette and CMYK images are converted, of an animation or of several pages the first is taken, transparency is
    left out. Of more than 8 bits a channel, the values are those of the smallest depth of 8, 10, 12, 14 and 16 bits
    that holds the largest of them, and their upper 8 bits are taken.

    Raises FileNotFoundError; ValueError for a damaged file, one of more than ``largest`` megapixels, and pixels whose
    range nobody knows (floating-point or negative numbers, more than 16 bits).
    """
    with _reading_image(path), _opened(path, largest) as (image, data):
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers, save it with 8 or 16 bits")
        turned = image.getexif().get(_ORIENTATION)
        if image.mode.startswith("I;16") or image.mode == "I":
            image = Image.fromarray(_eight_bits(np.asarray(image)))
        elif channel_bits(image, data) > 8:  # Pillow cuts such channels to their upper byte whatever their range
            image = Image.fromarray(_eight_bits(_deep_channels(data)))
        if turned is not None:
            image.getexif()[_ORIENTATION] = turned
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _reading_image(path: Path) -> AbstractContextManager[None]:
    return reading(path, "Image", "", "replace it, or take it off the list")


def read_size(path: Path) -> tuple[int, int]:
    """(H, W) of an image as ``read_image`` gives it, from the file's head; raises as that for what the head shows."""
    with _reading_image(path), open(path, "rb") as file, Image.open(file) as image:
        _check_head(image, LARGEST_MEGAPIXELS)
        turned = image.getexif().get(_ORIENTATION, 1) > 4
        return image.size if turned else image.size[::-1]


def check_image(path: Path) -> None:
    """Raise as ``read_image`` for what the head and the end of an image file show: no image, too large, cut short.

    A file that does not end as its format (JPEG, PNG, WebP) ends is decoded, and so are those of other formats. Damage
    between head and end is not found: this is for thousands of files, of which next to none is decoded.
    """
    with _reading_image(path), open(path, "rb") as file, Image.open(file) as image:
        _check_head(image, LARGEST_MEGAPIXELS)
        whole = _ends_whole(file, image.format)
    if not whole:
        read_image(path)


_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def _ends_whole(file: BinaryIO, form: str | None) -> bool:
    """Whether an image file is known to end where its format says."""
    size = file.seek(0, io.SEEK_END)
    if form == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= size
    file.seek(max(0, size - 16))
    return form in _ENDS and file.read().endswith(_ENDS[form])


_ORIENTATION = 0x0112
_BITS_PER_SAMPLE = 258


def channel_bits(image: Image.Image, start: bytes) -> int:
    """Bits of a channel in the file of an opened image, of which ``start`` has the first bytes: 8 where it is
    unknown."""
    if image.format == "PNG":
        return start[24]
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, 8)  # type: ignore[attr-defined]
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 16 if image.mode.startswith("I") else 8


def _deep_channels(data: bytes) -> np.ndarray:
    """(H, W, 3) of the 16-bit channels of a colour image, transparency left out."""
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype not in (np.uint8, np.uint16):
        raise ValueError("its channels have more than 8 bits in a form that is not read, save it with 8 bits")
    return values[..., [2, 1, 0]] if values.ndim == 3 else values


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Integers -> uint8 of the same shape, by the rule of ``read_image``."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high >= 1 << _DEPTHS[-1]:
        raise ValueError(f"its pixels are numbers from {low} to {high}, save it with 8 or 16 bits")
    depth = next(bits for bits in _DEPTHS if high < 1 << bits)
    return (values >> (depth - 8)).astype(np.uint8)


def _check_lossless(image: Image.Image) -> None:
    """ValueError where the format changes pixels, whatever the file's ending is."""
    if image.format in ("JPEG", "MPO", "JPEG2000"):
        raise ValueError(f"it is a {image.format} image in spite of its ending, and that changes the values")


def read_indices(path: Path) -> np.ndarray:
    """(H, W) int32 indices of a palette or grey picture of 8 or 16 bits. Raises as ``read_mask``."""
    with reading(path, "Picture", "", "replace it"), _opened(path, LARGEST_MEGAPIXELS) as (image, _):
        _check_lossless(image)
        mode, index = image.mode, np.array(image)
        if mode not in ("P", "L", "1", "I") and not mode.startswith("I;16"):
            raise ValueError(f"it is a {mode} image, not one of indices in one channel (palette or grey)")
    return index.astype(np.int32)


def read_mask(path: Path, largest: float = LARGEST_MEGAPIXELS) -> np.ndarray:
    """(H, W) uint8 indices of a mask: palette or grey, or in colours of which nothing is lost.

    Those are: VOC's colours, those of a ``labelmap.txt`` in the mask's folder or the one above it, and equal channels;
    a second or fourth channel must be opaque throughout. 16-bit values may not pass 255.

    Raises FileNotFoundError; ValueError for a damaged file, a JPEG, one of more than ``largest`` megapixels, and a
    colour that is no class's.
    """
    with reading(path, "Mask", "", "replace it"), _opened(path, largest) as (image, _):
        _check_lossless(image)
        mode, mask = image.mode, np.array(image)
    if mode in ("P", "L", "1"):
        return mask.astype(np.uint8)
    if mode.startswith("I") and mask.min() >= 0 and mask.max() <= 255:
        return mask.astype(np.uint8)
    if mode in ("LA", "RGBA") and (mask[..., -1] == 255).all():
        mask, mode = mask[..., :-1], mode[:-1]
    if mode == "L":
        return np.ascontiguousarray(mask[..., 0])
    found = _indices(mask, Path(path)) if mode == "RGB" else None
    if found is None:
        raise ValueError(
            f"Mask {path} is a {mode} image: masks hold class indices in one 8-bit channel (palette or grey), or VOC's "
            "colours, or those of a labelmap.txt beside them. Convert it."
        )
    return found


def _indices(mask: np.ndarray, path: Path) -> np.ndarray | None:
    """(H, W, 3) uint8 colours -> (H, W) uint8 indices; None where a colour is no class's."""
    codes, inverse = np.unique(mask.reshape(-1, 3) @ np.array([65536, 256, 1]), return_inverse=True)
    tables = [p / "labelmap.txt" for p in (path.parent, path.parent.parent) if (p / "labelmap.txt").is_file()]
    known = [_colours(table, table.stat().st_mtime_ns) for table in tables[:1]]
    known += [{code: value for value, code in enumerate(map(_code, palette().tolist()))}]
    known += [{value * 0x10101: value for value in range(256)}]
    for values in known:
        if all(code in values for code in codes.tolist()):
            table = np.array([values[code] for code in codes.tolist()], np.uint8)
            return table[inverse.ravel()].reshape(mask.shape[:2])
    return None


def _code(colour: Sequence[int]) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


@lru_cache
def _colours(path: Path, changed: int) -> dict[int, int]:
    return {_code(colour): value for colour, value in read_labelmap(path).values.items()}


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write (H, W) uint8 indices as a PNG with the VOC palette, atomically."""
    image = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    image.putpalette(palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def png_bytes(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> PNG file bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def layer_bytes(layer: np.ndarray) -> bytes:
    """(H, W, 4) uint8 RGBA of at most 256 colours, as the layers of misc.image.draw -> bytes of a small palette PNG.
    Raises ValueError for more colours."""
    packed = np.ascontiguousarray(layer).view(np.uint32)[..., 0]
    colours, index = np.unique(packed, return_inverse=True)
    if len(colours) > 256:
        raise ValueError(f"a layer of {len(colours)} colours, a palette PNG has at most 256")
    table = colours.view(np.uint8).reshape(-1, 4)
    image = Image.fromarray(index.reshape(layer.shape[:2]).astype(np.uint8))
    image.putpalette(table[:, :3].tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, transparency=table[:, 3].tobytes())
    return buffer.getvalue()


def jpeg_bytes(image: np.ndarray, quality: int = 90) -> bytes:
    """(H, W, 3) uint8 -> JPEG file bytes; ``quality`` is Pillow's, the default is for pictures to look at."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
