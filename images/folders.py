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

    Raises UserError that names a file which is no image.
    """
    cache = (
        data_dir / "cache" / f"{folder.resolve().name}-{size}px-{digest(folder, files, size)}.pt"
    )
    if cache.is_file():
        with contextlib.suppress(Exception):  # a damaged cache is decoded afresh, and overwritten
            images = torch.load(cache, weights_only=True, mmap=True)
            if images.shape == (len(files), 3, size, size) and images.dtype == torch.uint8:
                return images

    print(f"decoding {len(files):,} images of {folder} (once; kept in {cache})", flush=True)
    images = decode_all(files, size)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_torch(cache, images)
    except (OSError, UserError) as error:
        print(f"note: the decoded images are not kept for the next run ({error})", file=sys.stderr)
    return images


def digest(folder: Path, files: list[Path], size: int) -> str:
    """Sixteen letters that change when any of the files does.

    Names, lengths and times of change are not enough: archives keep whole seconds, so that two
    files may have all three in common, and be renamed into each other. Each file's inode and the
    time of its last change of any kind, which no program can set, tell them apart.
    """
    key = hashlib.sha256(f"2 {size} ".encode() + os.fsencode(folder.resolve()))
    for file in files:
        stat = file.stat()
        key.update(os.fsencode(file.relative_to(folder)))
        times = f"{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
        key.update(f"\0{stat.st_size}\0{stat.st_ino}\0{times}\n".encode())
    return key.hexdigest()[:16]


def decode_all(files: list[Path], size: int) -> Tensor:
    """uint8 (N, 3, size, size), on all processors. Raises UserError that names a bad file.

    Grey images of more than 8 bits have one scale in common, so that the same level is the same
    grey in all of them: the smallest usual number of bits that holds the highest level of all.
    """
    from PIL import Image

    # read_image refuses absurdly large files itself.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    highest: dict[int, int] = {}  # of the deep ones, by their index
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, pixels in enumerate(pool.map(lambda file: read_image(file, size), files)):
            if isinstance(pixels, int):
                highest[i] = pixels
            else:
                images[i] = torch.tensor(pixels).permute(2, 0, 1)
        if not highest:
            return images

        most = max(highest.values())
        bits = next(bits for bits in (8, 10, 12, 14, 16) if most < 2**bits)
        print(f"{len(highest):,} of them are grey with levels up to {most:,}: read as {bits} bits")
        deep = pool.map(lambda i: read_image(files[i], size, bits), highest)
        for i, pixels in zip(highest, deep, strict=True):
            images[i] = torch.tensor(pixels).permute(2, 0, 1)
    return images


def read_image(file: Path, size: int, bits: int | None = None) -> np.ndarray | int:
    """Decode one image file to RGB, uint8 (size, size, 3): scaled, then cropped to its middle.

    Any mode and orientation. Of a grey image of more than 8 bits this is its highest level
    instead, unless `bits` says that 2**bits - 1 is white. Raises UserError that names the file
    when it is no image, is damaged, has signed, 32-bit or floating-point pixels, or is absurdly
    large.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if image.width * image.height > 50_000_000:  # before any pixel is decoded
                raise ValueError(f"{image.width} x {image.height} pixels")
            image.draft("RGB", (size, size))  # a JPEG decoder may shrink by 2, 4 or 8 as it reads
            is_tiff = image.format == "TIFF"
            upright = ImageOps.exif_transpose(image)

            if upright.mode == "F":
                raise ValueError(
                    "its pixels are floating-point numbers: convert it to 8 or 16 bits"
                )
            if upright.mode.startswith("I"):
                # Pillow's I holds what I;16 cannot: of a TIFF, signed or 32-bit numbers; of a PGM,
                # 16 bits.
                if upright.mode == "I" and is_tiff:
                    problem = "its pixels are signed or 32-bit numbers"
                    raise ValueError(f"{problem}: convert it to 8 or 16 bits without a sign")
                levels = np.asarray(upright)
                if bits is None:
                    return int(levels.max())
                upright = Image.fromarray(to_eight_bits(levels, bits))
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


def to_eight_bits(levels: np.ndarray, bits: int) -> np.ndarray:
    """Levels from 0 to 2**bits - 1 as uint8 from 0 to 255, rounded: (H, W) -> (H, W)."""
    white = 2**bits - 1
    return ((levels.astype(np.int64) * 255 + white // 2) // white).astype(np.uint8)
