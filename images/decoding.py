"""The pixels of image files, decoded once into a file that is mapped into memory from then on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from images.folders import some
from machinery.errors import CannotWrite, UserError
from machinery.files import locked, replace, write_atomically

MOST_MEGAPIXELS = 250  # of one file; decoded, that is a gigabyte
CHUNK = 256  # images that are decoded before the next are looked at
KEEP_EVERY = 2.0  # seconds between two notes of how far the decoding is

# ------------------------------------------------------------------------------------------------
# A set's images, made once
# ------------------------------------------------------------------------------------------------


def decode(folder: Path, files: list[str], data_dir: Path, size: int) -> tuple[Tensor, str]:
    """(images as uint8 (N, 3, size, size), a hash of all their pixels).

    They are decoded once and kept below data_dir/cache, from where they are mapped: they take no
    memory that the system could not take back. An interrupted decoding goes on where it was.
    Raises UserError that names the files that are no images.
    """
    name = folder.resolve().name[:60]
    place = data_dir / "cache" / f"{name}-{size}px-{digest(folder, files, size)}"
    return made_once(place, files, size, f"decoding {len(files):,} images of {folder}")


def resize(images: Tensor, size: int, name: str, data_dir: Path) -> tuple[Tensor, str]:
    """A set's images uint8 (N, 3, H, W) at another size: as `decode` returns and keeps them.

    Scaled as those of a folder are.
    """
    place = data_dir / "cache" / f"{name}-{size}px-{hash_of(images)[:16]}"
    return made_once(place, images, size, f"resizing {len(images):,} images of {name}")


def made_once(
    place: Path, sources: Sequence[str] | Tensor, size: int, doing: str
) -> tuple[Tensor, str]:
    """What `decode_to` makes of files, or of images: mapped from `place`, where it is kept."""
    shape = (len(sources), 3, size, size)
    if kept := mapped(place, shape):
        return kept

    try:
        with locked(place):
            if kept := mapped(place, shape):  # another process has made them meanwhile
                return kept
            print(f"{doing} (once; kept in {place})", flush=True)
            decode_into(place, sources, size)
        kept = mapped(place, shape)
        assert kept is not None
        return kept

    except (OSError, CannotWrite) as error:
        reason = " ".join(str(error).split())
        print(f"note: the decoded images are not kept for the next run ({reason})", file=sys.stderr)
        buffer = io.BytesIO()
        decode_to(buffer, 0, sources, size, Progress())
        images = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).view(shape)
        return images, hash_of(images)
    except UserError:  # of files that are no images: once they are mended, all has another digest
        shutil.rmtree(place)
        raise


def digest(folder: Path, files: Sequence[str], size: int) -> str:
    """Sixteen letters that change when any of the files does.

    Names, lengths and times of change are not enough: archives keep whole seconds, so that two
    files may have all three in common, and be renamed into each other. Each file's inode and the
    time of its last change of any kind, which no program can set, tell them apart.
    """
    key = hashlib.sha256(f"3 {size} ".encode() + os.fsencode(folder.resolve()))
    start = len(str(folder))
    for file in files:
        stat = os.stat(file)
        times = f"{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
        key.update(os.fsencode(file[start:]))
        key.update(f"\0{stat.st_size}\0{stat.st_ino}\0{times}\n".encode())
    return key.hexdigest()[:16]


def mapped(place: Path, shape: tuple[int, ...]) -> tuple[Tensor, str] | None:
    """The images that are kept at `place`, and their hash; None if they are not there, or damaged.

    They may be written to: a page that is changed becomes this process's own.
    """
    with contextlib.suppress(OSError, ValueError, EOFError):
        images = np.load(place / "images.npy", mmap_mode="c")
        if images.shape == shape and images.dtype == np.uint8:
            return torch.from_numpy(images), (place / "sha256").read_text()
    return None


def hash_of(images: Tensor) -> str:
    """A hash of the pixels of uint8 (N, C, H, W)."""
    key = hashlib.sha256()
    for part in images.split(CHUNK):
        key.update(part.contiguous().numpy())
    return key.hexdigest()


@dataclass
class Progress:
    """How far a decoding is: the first `done` images. highest: {index: level} of deep greys."""

    done: int = 0
    highest: dict[int, int] = field(default_factory=dict)


def decode_into(place: Path, files: Sequence[str] | Tensor, size: int) -> None:
    """Decode files into place/images.npy, which appears whole or not at all."""
    part, note = place / "images.npy.part", place / "progress.json"
    progress = Progress()
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = json.loads(note.read_text())
        highest = {int(i): level for i, level in found["highest"].items()}
        progress = Progress(found["done"], highest)

    header = io.BytesIO()
    shape = (len(files), 3, size, size)
    layout = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    offset = header.tell()
    if not part.is_file() or part.stat().st_size < offset + progress.done * 3 * size * size:
        progress = Progress()
        part.write_bytes(header.getvalue())

    kept_at = time.monotonic()
    with open(part, "r+b") as file:

        def keep() -> None:
            nonlocal kept_at
            if time.monotonic() - kept_at < KEEP_EVERY:
                return
            kept_at = time.monotonic()
            file.flush()
            os.fsync(file.fileno())  # what is noted as done is on the disk
            write_atomically(note, json.dumps(vars(progress)).encode())

        decode_to(file, offset, files, size, progress, keep)
        file.flush()
        os.fsync(file.fileno())

    images = torch.from_numpy(np.load(part, mmap_mode="c"))
    write_atomically(place / "sha256", hash_of(images).encode())
    replace(part, place / "images.npy")
    note.unlink(missing_ok=True)


def decode_to(
    file: IO[bytes],
    offset: int,
    files: Sequence[str] | Tensor,
    size: int,
    progress: Progress,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Decode those of `files` that are not done, on all processors, one after another from offset.

    What was decoded before, uint8 (N, 3, H, W), may stand in their place, to be scaled.

    Grey images of more than 8 bits have one scale in common, so that the same level is the same
    grey in all of them: the smallest usual number of bits that holds the highest level of all.
    So they are read twice. `keep` is called now and then. Raises UserError that names bad files.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # read_image has its own limit, and says what to do
    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF data: the pixels are read
    row, broken = 3 * size * size, list[str]()
    on_terminal = sys.stdout.isatty()
    bar = tqdm(total=len(files), initial=progress.done, leave=False, disable=not on_terminal)

    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        while progress.done < len(files):
            chunk = files[progress.done : progress.done + CHUNK]
            file.seek(offset + progress.done * row)
            for i, found in enumerate(pool.map(lambda one: try_image(one, size), chunk)):
                if isinstance(found, UserError):
                    broken.append(str(found))
                elif isinstance(found, int):
                    progress.highest[progress.done + i] = found
                else:
                    file.write(as_row(found))
                    continue
                file.write(bytes(row))  # for now, to keep the others in their places
            progress.done += len(chunk)
            bar.update(len(chunk))
            if not broken:
                keep()
        if broken:
            raise UserError(in_one_line(broken))
        if not progress.highest:
            return

        most = max(progress.highest.values())
        bits = next(bits for bits in (8, 10, 12, 14, 16) if most < 2**bits)
        deep = list(progress.highest)
        print(f"{len(deep):,} of them are grey with levels up to {most:,}: read as {bits} bits")
        for start in range(0, len(deep), CHUNK):
            chunk_of_deep = deep[start : start + CHUNK]
            found_again = pool.map(lambda i: read_image(str(files[i]), size, bits), chunk_of_deep)
            for i, pixels in zip(chunk_of_deep, found_again, strict=True):
                assert isinstance(pixels, np.ndarray)
                file.seek(offset + i * row)
                file.write(as_row(pixels))


def as_row(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as the file holds it: all red ones, then green, then blue."""
    return pixels.transpose(2, 0, 1).tobytes()


def in_one_line(problems: Sequence[str]) -> str:
    """What is wrong with one file, or with several: ten of them are named."""
    if len(problems) == 1:
        return problems[0]
    each = [
        problem.removesuffix(REMEDY).replace(" is not an image that can be read", "")
        for problem in problems
    ]
    return f"{len(each):,} files are not images that can be read: {some(each)}{REMEDY}"


# ------------------------------------------------------------------------------------------------
# One image
# ------------------------------------------------------------------------------------------------

REMEDY = ": replace or remove it"


def try_image(file: str | Tensor, size: int) -> np.ndarray | int | UserError:
    """`read_image`, or what is wrong with the file."""
    if isinstance(file, Tensor):
        return scaled(file, size)
    try:
        return read_image(file, size)
    except UserError as error:
        return error


def scaled(image: Tensor, size: int) -> np.ndarray:
    """An image uint8 (3, H, W) as `read_image` would return a file of it."""
    from PIL import Image, ImageOps

    rgb = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return np.asarray(ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC))


def read_image(file: str | Path, size: int, bits: int | None = None) -> np.ndarray | int:
    """Decode one image file to RGB, uint8 (size, size, 3): scaled, then cropped to its middle.

    Any mode and orientation. Of a grey image of more than 8 bits this is its highest level
    instead, unless `bits` says that 2**bits - 1 is white. Raises UserError that names the file
    when it is no image, is damaged, has signed, 32-bit or floating-point pixels, is absurdly
    large, or when memory runs out.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            megapixels = image.width * image.height / 1e6
            if megapixels > MOST_MEGAPIXELS:  # before any pixel is decoded
                problem = f"too large ({megapixels:,.0f} megapixels, {MOST_MEGAPIXELS} at most)"
                raise UserError(f"{file} is {problem}: make it smaller, or remove it")
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

    except UserError:
        raise
    except MemoryError:
        problem = "memory ran out while it was decoded"
        raise UserError(f"{file}: {problem}: make it smaller, or close other programs") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = str(error).replace(str(file), "the file")
        raise UserError(f"{file} is not an image that can be read ({reason}){REMEDY}") from None


def to_eight_bits(levels: np.ndarray, bits: int) -> np.ndarray:
    """Levels from 0 to 2**bits - 1 as uint8 from 0 to 255, rounded: (H, W) -> (H, W)."""
    white = 2**bits - 1
    return ((levels.astype(np.int64) * 255 + white // 2) // white).astype(np.uint8)
