"""Image and mask files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from misc.files.store import reading, write_bytes
from misc.image.draw import palette


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of any image file that Pillow reads, turned as its EXIF orientation says.

    Grey, palette, CMYK and 16-bit images are converted; of an animation the first frame is taken.
    Raises FileNotFoundError; ValueError for a damaged file, and for floating-point pixels, whose range nobody knows.
    """
    with reading(path, "Image", "", "replace it, or take it off the list"), Image.open(path) as opened:
        opened.load()
        if opened.mode == "F":
            raise ValueError("its pixels are floating-point numbers, save it with 8 or 16 bits")
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16") or image.mode == "I":
            values = np.asarray(image).astype(np.int64)
            image = Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
        return np.array(image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """(H, W) uint8 indices of a palette or grey PNG mask.

    Raises FileNotFoundError; ValueError for a damaged file and for a colour image (indices would be lost).
    """
    with reading(path, "Mask", "", "replace it"), Image.open(path) as image:
        image.load()
        mode, mask = image.mode, np.array(image)
    if mode not in ("P", "L", "1"):
        raise ValueError(
            f"Mask {path} is a {mode} image: masks hold class indices in one 8-bit channel (palette or grey). "
            "Convert it."
        )
    return mask.astype(np.uint8)


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


def jpeg_bytes(image: np.ndarray, quality: int = 90) -> bytes:
    """(H, W, 3) uint8 -> JPEG file bytes; ``quality`` is Pillow's, the default is for pictures to look at."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
