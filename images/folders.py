"""A folder of image files as tensors: which files it holds, and their pixels, decoded once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from machinery.errors import UserError, check
from machinery.files import save_torch


def flat_files(folder: Path) -> list[Path]:
    """The image files that lie in `folder` itself, sorted."""
    there = (path for path in folder.iterdir() if not path.is_dir())
    return sorted(path for path in there if is_visible(path.relative_to(folder)))


def class_files(split: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """(files below split/<class>/, the class of each as int64 (N,), the classes' names)."""
    there = (path for path in split.glob("*/**/*") if not path.is_dir())
    files = sorted(path for path in there if is_visible(path.relative_to(split)))
    check(bool(files), f"--dataset: no images in {split}/<class>/")

    names = [path.relative_to(split).parts[0] for path in files]
    classes = sorted(set(names))  # an empty folder is no class
    return files, torch.tensor([classes.index(name) for name in names]), tuple(classes)


def is_visible(path: Path) -> bool:
    """Whether a file counts as an image: all but those that systems hide.

    A file that is none is found on decoding, and named.
    """
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.name.lower() not in ("thumbs.db", "desktop.ini")


def decode(folder: Path, files: list[Path], data_dir: Path, size: int) -> Tensor:
    """Decode files to uint8 (N, 3, size, size), once, and keep them in data_dir/cache.

    The cache's name has a digest of every file's path, length and time of change.
    """
    key = hashlib.sha256(f"1 {size} ".encode() + os.fsencode(folder.resolve()))
    for file in files:
        stat = file.stat()
        key.update(os.fsencode(file.relative_to(folder)))
        key.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    name = f"{folder.resolve().name}-{size}px-{key.hexdigest()[:16]}.pt"
    cache = data_dir / "cache" / name

    if cache.is_file():
        with contextlib.suppress(Exception):  # a damaged cache is decoded afresh, and overwritten
            images = torch.load(cache, weights_only=True, mmap=True)
            if images.shape == (len(files), 3, size, size) and images.dtype == torch.uint8:
                return images

    print(f"decoding {len(files):,} images of {folder} (once; kept in {cache})", flush=True)
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    from PIL import Image

    # read_image refuses absurdly large files itself.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, pixels in enumerate(pool.map(lambda file: read_image(file, size), files)):
            images[i] = torch.tensor(pixels).permute(2, 0, 1)

    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_torch(cache, images)
    except (OSError, UserError) as error:
        print(f"note: the decoded images are not kept for the next run ({error})", file=sys.stderr)
    return images


def read_image(file: Path, size: int) -> np.ndarray:
    """Decode one image file to RGB, uint8 (size, size, 3): scaled, then cropped to its middle.

    Any mode and orientation. Raises UserError that names the file when it is no image, is damaged,
    or is absurdly large.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if image.width * image.height > 50_000_000:  # before any pixel is decoded
                raise ValueError(f"{image.width} x {image.height} pixels")
            image.draft("RGB", (size, size))  # a JPEG decoder may shrink by 2, 4 or 8 as it reads
            upright = ImageOps.exif_transpose(image)

            if upright.mode == "F":
                raise ValueError("its pixels are floating-point numbers")
            if upright.mode.startswith("I"):  # 16-bit grey: Pillow would clip, not scale
                levels = np.asarray(upright)
                eight_bits = levels >> 8 if levels.max() > 255 else levels
                upright = Image.fromarray(eight_bits.astype(np.uint8))
            if upright.mode in ("P", "PA", "LA", "RGBA") or "transparency" in upright.info:
                rgba = upright.convert("RGBA")
                white = Image.new("RGBA", rgba.size, "white")
                upright = Image.alpha_composite(white, rgba)

            rgb = upright.convert("RGB")
            if rgb.size != (size, size):
                rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
            return np.asarray(rgb)

    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = str(error).replace(str(file), "the file")
        problem = f"{file} is not an image that can be read ({reason})"
        raise UserError(f"{problem}: replace or remove it") from None
