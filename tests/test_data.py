"""The data sets of functions.py: digits, CIFAR, STL-10 and folders of images."""

from __future__ import annotations

import http.client
import io
import os
import pickle
import shutil
import socket
import struct
import sys
import tarfile
import unicodedata
import urllib.error
import urllib.request
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Code
from helpers import randint, user_error
from PIL import Image

import functions as fn
from images import decoding, folders

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


# ------------------------------------------------------------------------------------------------
# Digits, CIFAR and STL-10
# ------------------------------------------------------------------------------------------------


def check_types(data: fn.ImageDataset, channels: int, size: int) -> None:
    """The tensors have the types and shapes that ImageDataset promises."""
    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    for images, labels in (train, test):
        assert images.dtype == torch.uint8
        assert images.shape == (len(labels), channels, size, size)
        assert labels.dtype == torch.int64
        assert int(labels.max()) < len(data.classes)


def test_digits_are_scikit_learns_scans_each_once_in_a_stratified_split():
    from sklearn.datasets import load_digits

    data, scans = fn.load_dataset("digits"), load_digits()
    check_types(data, 3, 8)
    assert data.classes == tuple("0123456789")
    assert len(data.train_images) + len(data.test_images) == 1797

    pixels = torch.cat([data.train_images, data.test_images])
    assert torch.equal(pixels[:, 0], pixels[:, 1])
    assert torch.equal(pixels[:, 0], pixels[:, 2])

    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    ours = zip(map(bytes, pixels[:, 0].numpy()), labels, strict=True)
    pixels = np.rint(scans.images * 255 / 16).astype(np.uint8)
    assert Counter(ours) == Counter(zip(map(bytes, pixels), scans.target.tolist(), strict=True))

    for digit in range(10):
        count, whole = int((data.test_labels == digit).sum()), (scans.target == digit).sum()
        assert abs(count - 0.2 * whole) <= 0.5


def test_digits_are_the_same_every_time():
    one, two = fn.load_dataset("digits"), fn.load_dataset("digits")
    assert torch.equal(one.train_images, two.train_images)
    assert torch.equal(one.test_labels, two.test_labels)
    assert one.pretraining_images is one.train_images


@pytest.fixture
def no_network(monkeypatch):
    """No network, and files of the torchvision data sets count as intact when they are there."""
    from torchvision.datasets import cifar, stl10, utils

    def unreachable(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    for module in (cifar, stl10, utils):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


def fake_cifar(
    folder: Path, key: str, files: dict[str, int], meta: tuple[str, str, int]
) -> dict[str, torch.Tensor]:
    """CIFAR's own format: pickled rows of 1024 red, 1024 green and 1024 blue values.

    Returns the images of each file.
    """
    folder.mkdir(parents=True)
    images = {
        name: randint(256, n, 3, 32, 32, seed=i, dtype=torch.uint8)
        for i, (name, n) in enumerate(files.items())
    }
    for name, pixels in images.items():
        labels = [i % meta[2] for i in range(len(pixels))]
        content = {"data": pixels.reshape(len(pixels), 3072).numpy(), key: labels}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [f"class {i}" for i in range(meta[2])]}))
    return images


def fake_cifar10(data_dir: Path) -> dict[str, torch.Tensor]:
    files = {**{f"data_batch_{i}": 3 for i in range(1, 6)}, "test_batch": 4}
    meta = ("batches.meta", "label_names", 10)
    return fake_cifar(data_dir / "cifar-10-batches-py", "labels", files, meta)


def fake_cifar100(data_dir: Path) -> dict[str, torch.Tensor]:
    files = {"train": 7, "test": 4}
    meta = ("meta", "fine_label_names", 100)
    return fake_cifar(data_dir / "cifar-100-python", "fine_labels", files, meta)


def fake_stl10(data_dir: Path) -> dict[str, torch.Tensor]:
    """STL-10's own format: values 1...10 for classes; each channel of an image column by column."""
    folder = data_dir / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("".join(f"class {i}\n" for i in range(10)))
    images = {}
    for i, (name, n) in enumerate({"train": 4, "test": 3, "unlabeled": 5}.items()):
        images[name] = randint(256, n, 3, 96, 96, seed=i, dtype=torch.uint8)
        images[name].transpose(2, 3).contiguous().numpy().tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            np.arange(1, n + 1, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    return images


def test_cifar10_keeps_pixels_channels_and_labels(tmp_path, no_network):
    files = fake_cifar10(tmp_path)
    data = fn.load_dataset("cifar10", tmp_path)
    check_types(data, 3, 32)

    train_images = torch.cat([files[f"data_batch_{i}"] for i in range(1, 6)])
    assert torch.equal(data.train_images, train_images)
    assert torch.equal(data.test_images, files["test_batch"])
    assert data.train_labels.tolist() == [0, 1, 2] * 5
    assert data.test_labels.tolist() == [0, 1, 2, 3]
    assert data.classes == tuple(f"class {i}" for i in range(10))
    assert data.unlabelled_images is None


def test_cifar100_has_its_hundred_fine_classes(tmp_path, no_network):
    files = fake_cifar100(tmp_path)
    data = fn.load_dataset("cifar100", tmp_path)
    check_types(data, 3, 32)
    assert torch.equal(data.train_images, files["train"])
    assert torch.equal(data.test_images, files["test"])
    assert data.train_labels.tolist() == list(range(7))
    assert data.classes == tuple(f"class {i}" for i in range(100))


def test_stl10_is_upright_and_has_its_unlabelled_images_for_pretraining(tmp_path, no_network):
    files = fake_stl10(tmp_path)
    data = fn.load_dataset("stl10", tmp_path)
    check_types(data, 3, 96)
    assert torch.equal(data.train_images, files["train"])
    assert torch.equal(data.test_images, files["test"])
    assert torch.equal(data.pretraining_images, files["unlabeled"])
    assert data.train_labels.tolist() == [0, 1, 2, 3]
    assert data.classes == tuple(f"class {i}" for i in range(10))


ARCHIVES = {
    "cifar10": (fake_cifar10, "cifar-10-python.tar.gz"),
    "cifar100": (fake_cifar100, "cifar-100-python.tar.gz"),
    "stl10": (fake_stl10, "stl10_binary.tar.gz"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_without_network_the_archive_is_named_and_putting_it_there_helps(
    name, tmp_path, no_network
):
    fake, archive = ARCHIVES[name]
    socket.setdefaulttimeout(123)
    try:
        message = user_error(fn.load_dataset, name, tmp_path / "data")
        assert socket.getdefaulttimeout() == 123
    finally:
        socket.setdefaulttimeout(None)
    remedy = (archive, str(tmp_path / "data"), "--dataset digits")
    for words in (f"--dataset {name}", *remedy, "no network"):
        assert words in message

    fake(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir(exist_ok=True)
    with tarfile.open(tmp_path / "data" / archive, "w:gz") as tar:
        for folder in (tmp_path / "elsewhere").iterdir():
            tar.add(folder, folder.name)
    check_types(fn.load_dataset(name, tmp_path / "data"), 3, 96 if name == "stl10" else 32)


@pytest.mark.parametrize("form", ["unpacked", "archive"])
def test_data_that_is_not_the_original_is_never_opened(form, tmp_path, monkeypatch):
    """CIFAR comes as pickles, which can run code: torchvision checks their checksums first."""

    def unreachable(*_, **__):
        raise urllib.error.URLError("no network here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    folder = tmp_path / "data" if form == "unpacked" else tmp_path / "elsewhere"
    fake_cifar10(folder)
    for file in (folder / "cifar-10-batches-py").iterdir():
        file.write_bytes(pickle.dumps(Code()))
    if form == "archive":
        (tmp_path / "data").mkdir()
        with tarfile.open(tmp_path / "data/cifar-10-python.tar.gz", "w:gz") as tar:
            tar.add(folder / "cifar-10-batches-py", "cifar-10-batches-py")

    assert "could not be downloaded" in user_error(fn.load_dataset, "cifar10", tmp_path / "data")
    assert not (tmp_path / "hacked").exists()

    pickle.loads(pickle.dumps(Code()))
    assert (tmp_path / "hacked").exists(), "the test can fail"


@pytest.mark.parametrize(
    "error", [TimeoutError(), ConnectionResetError(104, "reset"), http.client.BadStatusLine("?")]
)
def test_every_failure_of_a_download_is_a_user_error(error, tmp_path, no_network, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    assert "cifar-10-python.tar.gz" in user_error(fn.load_dataset, "cifar10", tmp_path)


def test_a_download_cannot_wait_for_ever(tmp_path, no_network, monkeypatch):
    seen = []

    def note(*_, **__):
        seen.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", note)
    user_error(fn.load_dataset, "cifar10", tmp_path)
    assert seen
    assert None not in seen
    assert socket.getdefaulttimeout() is None


def test_data_dir_that_is_a_file_is_named(tmp_path, no_network):
    (tmp_path / "file").write_text("precious")
    assert str(tmp_path / "file") in user_error(fn.load_dataset, "cifar10", tmp_path / "file")


# ------------------------------------------------------------------------------------------------
# Folders of images
# ------------------------------------------------------------------------------------------------


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def save(file: str, image: Image.Image | tuple[int, ...], **options) -> Path:
    """Save this image, or one of 12 x 9 pixels of this colour."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    (Image.new("RGB", (12, 9), image) if isinstance(image, tuple) else image).save(file, **options)
    return Path(file)


def load(folder: str = "photos", size: int | None = 8) -> fn.ImageDataset:
    return fn.load_dataset(folder, "data", size)


def pixels_of(
    image: Image.Image, file: str = "photos/a.png", size: int = 8, **options
) -> torch.Tensor:
    """What one image becomes, int (3, size, size)."""
    save(file, image, **options)
    images = load(size=size).train_images
    assert images.dtype == torch.uint8
    assert images.shape == (1, 3, size, size)
    return images[0].int()


def assert_colour(pixels: torch.Tensor, colour: tuple[int, ...], within: int = 0) -> None:
    """All pixels (3, ...) have this colour."""
    difference = (pixels.flatten(1) - torch.tensor(colour).view(3, 1)).abs().max()
    assert difference <= within, f"{pixels.flatten(1)[:, 0].tolist()}... is not {colour}"


def two_classes(folder: str = "photos") -> None:
    """cat is red (2 for training, 1 for test), dog is blue (1 and 2)."""
    cats = ("train/cat/a", "train/cat/b", "test/cat/c")
    dogs = ("train/dog/a", "test/dog/x/deep", "test/dog/b")
    for name in (*cats, *dogs):
        save(f"{folder}/{name}.png", RED if "cat" in name else BLUE)


def test_class_folders_give_images_labels_and_class_names():
    two_classes()
    data = load()
    check_types(data, 3, 8)
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 1]
    assert data.test_labels.tolist() == [0, 1, 1]

    for images, labels in (data.labelled()[:2], data.labelled()[2:]):
        for image, label in zip(images, labels, strict=True):
            assert_colour(image.int(), (RED, BLUE)[label])


def test_a_class_that_the_test_split_lacks_keeps_the_numbers_of_the_others():
    save("photos/train/ant/a.png", GREEN)
    two_classes()
    data = load()
    assert data.classes == ("ant", "cat", "dog")
    assert data.test_labels.tolist() == [1, 2, 2]


def test_images_are_32_pixels_unless_told_otherwise():
    save("photos/a.png", RED)
    assert load(size=None).train_images.shape == (1, 3, 32, 32)


def test_flat_folder_has_images_in_the_order_of_their_names_and_no_labels():
    for name, colour in (("b", GREEN), ("a", RED), ("c", BLUE)):
        save(f"photos/{name}.png", colour)
    data = load()
    assert (data.train_labels, data.test_labels, data.classes) == (None, None, ())
    assert data.test_images is None

    for image, colour in zip(data.train_images, (RED, GREEN, BLUE), strict=True):
        assert_colour(image.int(), colour)
    assert data.pretraining_images is data.train_images


def test_images_of_any_size_become_square():
    for i, size in enumerate([(1, 1), (8, 8), (3, 50), (200, 7), (64, 48)]):
        save(f"photos/{i}.png", Image.new("RGB", size, (10, 200, 30)))
    data = load()
    assert data.train_images.shape == (5, 3, 8, 8)
    assert_colour(data.train_images.transpose(0, 1).int(), (10, 200, 30))


def test_an_image_of_the_exact_size_keeps_its_exact_pixels():
    noise = randint(256, 16, 16, 3, dtype=torch.uint8)
    pixels = pixels_of(Image.fromarray(noise.numpy()), size=16)
    assert torch.equal(pixels, noise.permute(2, 0, 1).int())


def test_a_wide_image_is_cropped_to_its_middle():
    stripes = Image.new("RGB", (96, 32), GREEN)
    stripes.paste(RED, (0, 0, 32, 32))
    stripes.paste(BLUE, (64, 0, 96, 32))
    assert_colour(pixels_of(stripes)[:, :, 1:-1], GREEN)


@pytest.mark.parametrize(
    ("mode", "colour", "file", "expected"),
    [
        ("L", 100, "a.png", (100, 100, 100)),
        ("L", 100, "a.jpg", (100, 100, 100)),
        ("1", 1, "a.png", WHITE),
        ("LA", (100, 255), "a.png", (100, 100, 100)),
        ("LA", (0, 0), "a.png", WHITE),
        ("RGBA", (255, 0, 0, 255), "a.png", RED),
        ("RGBA", (0, 0, 0, 0), "a.png", WHITE),  # transparent pixels become white
        ("RGBA", (255, 0, 0, 128), "a.png", (255, 127, 127)),
        ("CMYK", (0, 255, 255, 0), "a.jpg", RED),
        ("RGB", (10, 200, 30), "a.bmp", (10, 200, 30)),
        ("RGB", (10, 200, 30), "a.webp", (10, 200, 30)),
        ("RGB", (10, 200, 30), "NO-EXTENSION", (10, 200, 30)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, file, expected):
    options = {"format": "png"} if "." not in file else {}
    assert_colour(
        pixels_of(Image.new(mode, (20, 20), colour), f"photos/{file}", **options),
        expected,
        0 if "png" in file else 4,
    )


@pytest.mark.parametrize("file", ["a.png", "a.pgm", "a.tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(file):
    grey = Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16))
    assert_colour(pixels_of(grey, f"photos/{file}"), (156, 156, 156), within=1)


def save_levels(file: str, levels: list[int] | np.ndarray, dtype: str = "uint16") -> Path:
    """Save a row of grey levels, each eight pixels high and wide."""
    row = np.repeat(np.repeat(np.array([levels]), 8, 0), 8, 1).astype(dtype)
    return save(file, Image.fromarray(row))


def greys(size: int = 8) -> list[int]:
    """The grey in the middle of each image of the folder."""
    return load(size=size).train_images[:, 0, size // 2, size // 2].tolist()


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0, 100, 255], [0, 100, 255]),  # 8 bits in a container of 16
        ([0, 128, 256], [0, 32, 64]),  # 10 bits
        ([0, 2048, 4095], [0, 128, 255]),  # 12
        ([0, 8192, 16383], [0, 128, 255]),  # 14
        ([0, 32768, 65535], [0, 128, 255]),  # 16
        ([255, 256, 65535], [1, 1, 255]),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_levels_of_a_folder_have_one_scale(levels, expected, suffix, capsys):
    """The same level is the same grey in every file, whatever else that file holds."""
    for i, level in enumerate(levels):
        save_levels(f"photos/{i}.{suffix}", [level])
    assert greys() == expected
    assert f"3 of them are grey with levels up to {max(levels):,}" in capsys.readouterr().out


def test_grey_levels_are_rounded_and_monotone():
    levels = np.arange(0, 65536, 257)
    folder_wide = [int(decoding.to_eight_bits(np.array([level]), 16)[0]) for level in levels]
    assert folder_wide == list(range(256))
    for bits in (8, 10, 12, 14, 16):
        ramp = decoding.to_eight_bits(np.arange(2**bits, dtype=np.uint16), bits)
        exact = np.arange(2**bits) * 255 / (2**bits - 1)
        assert np.abs(ramp - exact).max() <= 0.5
        assert (np.diff(ramp.astype(int)) >= 0).all()


def test_train_and_test_have_one_scale():
    for split, level in (("train", 4095), ("test", 2048)):
        for c in "ab":
            save_levels(f"photos/{split}/{c}/x.png", [level])
    data = load()
    assert data.train_images[0, 0, 4, 4] == 255
    assert data.test_images[0, 0, 4, 4] == 128


def test_images_of_eight_bits_keep_their_own_levels_beside_deeper_ones():
    save_levels("photos/a.png", [4095])
    save("photos/b.png", Image.new("L", (8, 8), 100))
    save("photos/c.png", (10, 200, 30))
    images = load().train_images
    assert images[:2, 0, 4, 4].tolist() == [255, 100]
    assert_colour(images[2].int(), (10, 200, 30))


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint32", "float32", "float64"])
def test_pixels_that_are_no_grey_levels_are_refused(dtype):
    """Signed numbers would wrap: -1000 is no shade of grey, and no other number says which."""
    pixels = np.linspace(0, 250, 144).reshape(12, 12).astype(dtype)
    if dtype.startswith(("int", "float")):
        pixels[0, 0] = -1000
    save("photos/a.png", RED)
    save("photos/b.tif", Image.fromarray(pixels))
    message = user_error(load)
    assert "b.tif" in message
    assert "convert it to 8 or 16 bits" in message


@pytest.mark.parametrize(("options", "left"), [({}, (0, 255, 0)), ({"transparency": 0}, WHITE)])
def test_palette_image_shows_its_colours_and_transparency(options, left):
    halves = Image.new("P", (8, 8), 1)
    halves.putpalette([*GREEN, *RED])
    halves.paste(0, (0, 0, 4, 8))
    pixels = pixels_of(halves, **options)
    assert_colour(pixels[:, :, :4], left)
    assert_colour(pixels[:, :, 4:], RED)


@pytest.mark.parametrize("size", [(16, 16), (300, 200), (200, 320)])
@pytest.mark.parametrize(
    ("orientation", "turn"), [(1, None), (3, "ROTATE_180"), (6, "ROTATE_90"), (8, "ROTATE_270")]
)
def test_a_photo_taken_sideways_is_turned_upright(size, orientation, turn):
    upright = Image.new("RGB", size, BLUE)
    upright.paste(RED, (0, 0, size[0], size[1] // 2))
    stored = upright.transpose(Image.Transpose[turn]) if turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = pixels_of(stored, "photos/a.jpg", size=16, exif=exif, quality=95, subsampling=0)
    assert_colour(pixels[:, :6], RED, within=12)
    assert_colour(pixels[:, 10:], BLUE, within=12)


def cache_file() -> Path:
    (file,) = Path("data/cache").glob("*/images.npy")
    return file


def test_a_folder_is_decoded_once(monkeypatch):
    two_classes()
    first = load()
    monkeypatch.setattr(decoding, "read_image", lambda *_: pytest.fail("decoded again"))
    second = load()
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_images, second.test_images)
    assert torch.equal(first.test_labels, second.test_labels)


def test_another_size_is_decoded_on_its_own():
    save("photos/a.png", RED)
    assert load(size=8).train_images.shape[-1] == 8
    assert load(size=9).train_images.shape[-1] == 9
    assert load(size=8).train_images.shape[-1] == 8


@pytest.mark.parametrize(
    "change", ["content", "length", "new file", "removed file", "renamed file"]
)
def test_a_changed_folder_is_decoded_afresh(change):
    save("photos/a.bmp", RED)
    save("photos/b.bmp", BLUE)
    assert len(load().train_images) == 2

    if change == "content":  # of the same length in bytes
        later = os.stat(save("photos/a.bmp", GREEN)).st_mtime_ns + 10**9
        os.utime("photos/a.bmp", ns=(later, later))
    elif change == "length":  # within the clock's resolution
        time = os.stat("photos/a.bmp").st_mtime_ns
        os.utime(save("photos/a.bmp", Image.new("RGB", (30, 30), GREEN)), ns=(time, time))
    elif change == "new file":
        save("photos/0.bmp", GREEN)
    elif change == "removed file":
        os.remove("photos/a.bmp")
    else:
        os.rename("photos/a.bmp", "photos/c.bmp")

    first = BLUE if change in ("removed file", "renamed file") else GREEN
    assert_colour(load().train_images[0].int(), first)


AS_UNPACKED = 10**18  # an archive's time of change, in whole seconds


def swap(a: str, b: str) -> None:
    os.rename(a, "aside")
    os.rename(b, a)
    os.rename("aside", b)


@pytest.mark.parametrize(
    "change", ["folders swapped", "files swapped", "pixels replaced", "files exchanged by a copy"]
)
def test_names_lengths_and_times_of_change_do_not_make_a_file(change):
    """Each time all three are as before, and the images are not."""
    for c, colour in (("a", RED), ("b", BLUE)):
        for i in range(2):
            os.utime(save(f"photos/train/{c}/{i}.bmp", colour), ns=(AS_UNPACKED,) * 2)
    assert_colour(load().train_images[0].int(), RED)

    first, other = "photos/train/a/0.bmp", "photos/train/b/0.bmp"
    if change == "folders swapped":
        swap("photos/train/a", "photos/train/b")
    elif change == "files swapped":
        swap(first, other)
    elif change == "pixels replaced":
        save(first, BLUE)
    else:
        shutil.copyfile(other, first)
    os.utime(first, ns=(AS_UNPACKED,) * 2)
    assert_colour(load().train_images[0].int(), BLUE)


def test_what_only_reads_the_files_leaves_the_cache_alone(monkeypatch):
    os.utime(save("photos/a.bmp", RED), ns=(AS_UNPACKED,) * 2)
    load()
    Path("photos/a.bmp").read_bytes()
    list(Path("photos").iterdir())
    monkeypatch.setattr(decoding, "read_image", lambda *_: pytest.fail("decoded again"))
    load()


def test_two_folders_of_one_name_do_not_share_a_cache():
    for folder, colour in (("mine/photos", RED), ("yours/photos", BLUE)):
        os.utime(
            save(f"{folder}/a.bmp", colour), ns=(10**18, 10**18)
        )  # as if unpacked from an archive
        assert_colour(load(folder).train_images[0].int(), colour)


@pytest.mark.parametrize(
    "damage", ["empty", "truncated", "garbage", "another shape", "another type"]
)
def test_a_damaged_cache_is_decoded_afresh_and_mended(damage, monkeypatch):
    two_classes()
    expected = load().train_images.clone()
    file, whole = cache_file(), cache_file().read_bytes()
    if damage == "another shape":
        np.save(file, np.zeros((1, 3, 8, 8), np.uint8))
    elif damage == "another type":
        np.save(file, np.zeros((4, 3, 8, 8), np.float32))
    else:
        half, garbage = whole[: len(whole) // 2], b"garbage" * 100
        file.write_bytes({"empty": b"", "truncated": half, "garbage": garbage}[damage])

    assert torch.equal(load().train_images, expected)
    monkeypatch.setattr(decoding, "read_image", lambda *_: pytest.fail("the cache was not mended"))
    assert torch.equal(load().train_images, expected)


def test_a_cache_that_cannot_be_written_is_only_noted(capsys):
    two_classes()
    Path("data").write_text("a file, no folder")
    assert len(load().train_images) == 3
    error = capsys.readouterr().err
    assert error.startswith("note: ")
    assert len(error.splitlines()) == 1
    assert Path("data").read_text() == "a file, no folder"


@pytest.mark.parametrize("where", ["photos", "photos/train", "photos/train/cat"])
def test_files_that_systems_hide_are_ignored(where):
    two_classes()
    for name in (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini"):
        Path(where, name).write_text("no image")
    assert load().train_labels.tolist() == [0, 0, 1]
    save("flat/a.png", RED)
    Path("flat/.DS_Store").write_text("no image")
    assert len(load("flat").train_images) == 1


@pytest.mark.parametrize("where", ["photos/train", "photos/train/cat"])
def test_hidden_folders_are_ignored(where):
    two_classes()
    save(f"{where}/.ipynb_checkpoints/a-checkpoint.png", GREEN)
    data = load()
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 1]


def test_an_empty_class_folder_is_no_class():
    two_classes()
    for folder in ("train/bee", "train/cow", "test/ape"):
        Path("photos", folder).mkdir()
    data = load()
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 1]
    assert data.test_labels.tolist() == [0, 1, 1]


def test_a_missing_folder_is_named_with_the_sets_there_are():
    message = user_error(load, "nowhere")
    assert "--dataset nowhere" in message
    assert "digits" in message


@pytest.mark.parametrize(
    "folders", [["."], ["cat"], ["train"], ["train/cat"], ["train/cat", "train/dog"]]
)
def test_a_folder_without_images_is_named(folders):
    for folder in folders:
        Path("photos", folder).mkdir(parents=True)
    assert "photos" in user_error(load)


def test_images_in_train_without_class_folders_are_refused():
    save("photos/train/a.png", RED)
    assert "photos/train/<class>" in user_error(load)


def test_a_test_class_that_train_lacks_is_named():
    two_classes()
    save("photos/test/emu/a.png", GREEN)
    message = user_error(load)
    assert "emu" in message
    assert "photos" in message
    assert "cat" not in message


def png_of_claimed_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


NOISE = randint(256, 64, 64, 3, dtype=torch.uint8)
BROKEN = {
    "text.png": b"this is no image\n",
    "empty.png": b"",
    "truncated.jpg": encoded(Image.fromarray(NOISE.numpy()), "jpeg")[:2000],
    "notes.txt": b"a list of the photos\n",
    "larger.png": png_of_claimed_size(10_000, 10_000),
    "absurd.png": png_of_claimed_size(2**31 - 1, 2**31 - 1),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("where", ["flat", "photos/train/cat", "photos/test/dog"])
def test_a_file_that_is_no_readable_image_is_named_and_all_that_is_said(
    name, where, recwarn, capsys
):
    two_classes()
    save("flat/a.png", RED)
    Path(where, name).write_bytes(BROKEN[name])
    assert f"{where}/{name}" in user_error(load, where.split("/")[0])
    assert [str(warning.message) for warning in recwarn] == []
    assert capsys.readouterr().err == ""
    assert not list(Path("data").rglob("*.npy*"))


def test_labelled_images_are_refused_to_a_set_that_has_no_classes_or_test_images_or_one_class():
    save("flat/a.png", RED)
    assert "flat" in user_error(load("flat").labelled)
    save("untested/train/cat/a.png", RED)
    save("untested/train/dog/a.png", RED)
    assert "untested/test/<class>" in user_error(load("untested").labelled)
    save("single/train/cat/a.png", RED)
    save("single/test/cat/a.png", RED)
    assert "one class" in user_error(load("single").labelled)


def test_a_dangling_link_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/link.png").symlink_to("nowhere.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/a.png")
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def main(_: fn.RunConfig) -> None:
        fn.load_dataset(str(tmp_path / "flat"), tmp_path)

    with pytest.raises(SystemExit) as exit_:
        fn.command_line(main, fn.RunConfig, None)
    error = capsys.readouterr().err
    assert (exit_.value.code, len(error.splitlines())) == (2, 1)
    assert "link.png" in error


# ------------------------------------------------------------------------------------------------
# Nothing is left out in silence
# ------------------------------------------------------------------------------------------------


def test_links_to_folders_are_followed(capsys):
    two_classes()
    save("elsewhere/more/deep/1.png", RED)
    save("elsewhere/bees/1.png", GREEN)
    Path("photos/train/cat/more").symlink_to(Path("elsewhere/more").absolute())
    Path("photos/train/bee").symlink_to(Path("elsewhere/bees").absolute())
    data = load()
    assert data.classes == ("bee", "cat", "dog")
    assert data.train_labels.tolist() == [0, 1, 1, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("target", ["photos", "photos/train", "photos/train/cat", "photos/test"])
def test_links_in_circles_end(target, capsys):
    two_classes()
    Path("photos/train/cat/round").symlink_to(Path(target).absolute())
    data = load()
    assert (data.classes, data.train_labels.tolist()) == (("cat", "dog"), [0, 0, 1])
    assert "photos/train/cat/round" in capsys.readouterr().err


def test_a_directory_counts_once_and_for_the_class_in_which_it_lies(capsys):
    two_classes()
    save("photos/train/dog/deep/1.png", BLUE)
    Path("photos/train/cat/a_link").symlink_to(Path("photos/train/dog/deep").absolute())
    save("outside/1.png", RED)
    for name in ("one", "two"):
        Path(f"photos/train/cat/{name}").symlink_to(Path("outside").absolute())
    assert load().train_labels.tolist() == [0, 0, 0, 1, 1]
    error = capsys.readouterr().err
    assert "cat/a_link" in error
    assert "cat/two" in error
    assert len(error.splitlines()) == 1


def test_a_folder_that_both_splits_show_is_a_warning(capsys):
    two_classes()
    Path("photos/test/cat/again").symlink_to(Path("photos/train/cat").absolute())
    assert len(load().test_images) == 5
    error = capsys.readouterr().err
    assert "some test images are training images" in error


def test_a_flat_folder_is_read_to_its_depths(capsys):
    for name in ("b", "a/deep/2", "a/1", "c/.hidden/3", "c/@eaDir/4"):
        save(f"photos/{name}.png", RED if name == "a/1" else BLUE)
    save("elsewhere/5.png", GREEN)
    Path("photos/link").symlink_to(Path("elsewhere").absolute())
    images = load().train_images
    assert len(images) == 4
    for image, colour in zip(images, (RED, BLUE, BLUE, GREEN), strict=True):
        assert_colour(image.int(), colour)
    said = capsys.readouterr()
    assert "photos: 4 images without classes" in said.out
    assert said.err == ""


def test_the_order_of_files_is_that_of_their_paths():
    names = ["a-b/1", "a/1", "a/b/1", "a/b-c", "a.png/1", "B/1", "b"]
    for name in names:
        save(f"photos/{name}.png", RED)
    files = [os.path.relpath(file, "photos") for file in folders.flat_files(Path("photos"))]
    assert files == [str(path) for path in sorted(Path(f"{name}.png") for name in names)]


@pytest.mark.parametrize("name", ["train/loose.png", "train/labels.csv", "train/more.zip", "val"])
def test_what_lies_beside_the_class_folders_is_named(name, capsys):
    two_classes()
    save(f"photos/{name}" if "." in name else f"photos/{name}/cat/a.png", RED, format="png")
    assert load().train_labels.tolist() == [0, 0, 1]
    error = capsys.readouterr().err
    assert error == f"note: not read in photos: photos/{name}\n"


def test_of_many_things_that_are_not_read_ten_are_named(capsys):
    two_classes()
    for i in range(13):
        save(f"photos/train/{i:02}.png", RED)
    load()
    error = capsys.readouterr().err
    assert "train/09.png and 3 more" in error
    assert "train/10.png" not in error


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"])
@pytest.mark.parametrize("where", ["photos", "photos/train", "photos/train/cat"])
def test_what_systems_leave_is_no_class_and_no_image(name, where, capsys):
    two_classes()
    save(f"{where}/{name}/a.png", GREEN)
    data = load()
    assert (data.classes, data.train_labels.tolist()) == (("cat", "dog"), [0, 0, 1])
    assert capsys.readouterr().err == ""


def test_a_pipe_is_not_waited_for(capsys):
    two_classes()
    os.mkfifo("photos/train/cat/pipe.png")
    assert load().train_labels.tolist() == [0, 0, 1]
    assert "photos/train/cat/pipe.png" in capsys.readouterr().err


def test_one_name_in_two_forms_of_unicode_is_one_class():
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for name in (one, two):
        save(f"photos/train/{name}/{len(name)}.png", RED)
    save("photos/train/tea/a.png", GREEN)
    save(f"photos/test/{two}/a.png", RED)
    data = load()
    assert data.classes == (one, "tea")
    assert data.train_labels.tolist() == [0, 0, 1]
    assert data.test_labels.tolist() == [0]


def test_one_line_counts_the_images(capsys):
    two_classes()
    load()
    line = "photos: 3 train images of 2 classes, from 1 of dog to 2 of cat; 3 test images of 2"
    assert line in capsys.readouterr().out


def test_all_broken_files_are_named_at_once():
    two_classes()
    for i in range(13):
        Path(f"photos/train/cat/broken{i:02}.png").write_text("no image")
    message = user_error(load)
    assert "13 files" in message
    assert all(f"broken{i:02}.png" in message for i in range(10))
    assert message.endswith(" and 3 more: replace or remove it")


# ------------------------------------------------------------------------------------------------
# Large images, and large sets
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [7100, 12000])
def test_a_photo_of_many_megapixels_is_read(side):
    assert_colour(pixels_of(Image.new("1", (side, side), 1)), WHITE)


def test_an_image_beyond_the_limit_is_called_too_large():
    save("photos/a.png", RED)
    Path("photos/b.png").write_bytes(png_of_claimed_size(20_000, 20_000))
    expected = (
        "photos/b.png is too large (400 megapixels, 250 at most): make it smaller, or remove it"
    )
    assert user_error(load) == expected


def test_memory_that_runs_out_while_decoding_names_the_file(monkeypatch):
    save("photos/a.png", RED)

    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", no_memory)
    message = user_error(load)
    assert "photos/a.png" in message
    assert "memory ran out" in message
    assert "batch" not in message


def test_odd_exif_data_is_no_news(recwarn, capsys):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0"  # ends too soon
    save("photos/a.jpg", Image.new("RGB", (9, 9), RED), exif=exif)
    load()
    assert [str(warning.message) for warning in recwarn] == []
    assert capsys.readouterr().err == ""


def many(count: int) -> None:
    for i in range(count):
        save(f"photos/{i:03}.bmp", (i, 0, 0))


class Killed(BaseException):
    """Stands in for the end of the process."""


def interrupt_decoding(monkeypatch, after: int) -> None:
    """Load photos, and end when `after` images have been read."""
    monkeypatch.setattr(decoding, "CHUNK", 10)
    monkeypatch.setattr(decoding, "KEEP_EVERY", 0)
    read, count = decoding.read_image, iter(range(10**6))

    def reading(*args):
        if next(count) >= after:
            raise Killed
        return read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "read_image", reading)
        with pytest.raises(Killed):
            load()


def test_an_interrupted_decoding_goes_on_where_it_was(monkeypatch):
    many(95)
    interrupt_decoding(monkeypatch, 55)
    assert not list(Path("data").rglob("images.npy"))
    read, again = decoding.read_image, []
    monkeypatch.setattr(decoding, "read_image", lambda *args: again.append(args[0]) or read(*args))
    images = load().train_images
    assert sorted(again) == [f"photos/{i:03}.bmp" for i in range(50, 95)]
    assert images[:, 0, 0, 0].tolist() == list(range(95))


@pytest.mark.parametrize("part", ["truncated", "gone", "note torn", "note of more than there is"])
def test_what_an_interrupted_decoding_left_is_checked(part, monkeypatch):
    many(40)
    interrupt_decoding(monkeypatch, 35)
    (file,), (note,) = Path("data").rglob("*.part"), Path("data").rglob("progress.json")
    if part == "truncated":
        os.truncate(file, 1000)
    elif part == "gone":
        file.unlink()
    elif part == "note torn":
        note.write_text('{"done": 3')
    else:
        note.write_text('{"done": 39, "highest": {}}')
    assert load().train_images[:, 0, 0, 0].tolist() == list(range(40))


def test_the_scale_of_deep_greys_outlives_an_interruption(monkeypatch):
    many(30)
    deep = np.full((8, 8), 1000, np.uint16)
    for i, name in enumerate(("000a", "029a")):  # the second is read after the interruption
        Path(f"photos/{name}.png").parent.mkdir(exist_ok=True)
        Image.fromarray(deep * (1 + 3 * i)).save(f"photos/{name}.png")
    interrupt_decoding(monkeypatch, 25)
    images = load().train_images
    assert images[1].unique().tolist() == [(1000 * 255 + 2047) // 4095]
    assert images[-1].unique().tolist() == [(4000 * 255 + 2047) // 4095]


def test_decoded_images_take_no_memory_of_their_own():
    """They are mapped: the pages are the file's, which the system may take back."""
    many(30)
    load()
    images = load(size=8).train_images
    name, start = str(cache_file()), images.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(word, 16) for word in line.split()[0].split("-"))
        if low <= start < high:
            assert line.endswith(name)
            return
    pytest.fail("the images are nowhere")


def test_stl10s_unlabelled_images_are_mapped_too(tmp_path, no_network):
    files = fake_stl10(tmp_path)
    unlabelled = fn.load_dataset("stl10", tmp_path).unlabelled_images
    assert torch.equal(unlabelled, files["unlabeled"])
    assert isinstance(unlabelled.untyped_storage(), torch.UntypedStorage)
    maps = Path("/proc/self/maps").read_text()
    assert "unlabeled_X.bin" in maps


# ------------------------------------------------------------------------------------------------
# Fingerprints
# ------------------------------------------------------------------------------------------------


def test_the_same_images_elsewhere_have_the_same_fingerprint():
    two_classes()
    two_classes("moved/to/pictures")
    assert load().fingerprint == load("moved/to/pictures").fingerprint
    assert load().fingerprint == load("photos/").fingerprint == load("../here/photos").fingerprint


@pytest.mark.parametrize("change", ["pixel", "class", "name", "label", "split", "size", "order"])
def test_any_change_of_the_data_changes_the_fingerprint(change):
    two_classes()
    before = load().fingerprint
    if change == "pixel":
        image = Image.open("photos/test/dog/b.png")
        image.putpixel((5, 5), GREEN)
        image.save("photos/test/dog/b.png")
    elif change == "class":
        save("photos/train/emu/a.png", GREEN)
    elif change == "name":
        for split in ("train", "test"):
            os.rename(f"photos/{split}/dog", f"photos/{split}/doge")
    elif change == "label":
        os.rename("photos/train/cat/b.png", "photos/train/dog/0.png")
    elif change == "split":
        os.rename("photos/test/dog/b.png", "photos/train/dog/b.png")
    elif change == "order":
        os.rename("photos/test/dog/b.png", "photos/test/cat/d.png")
    assert load(size=9 if change == "size" else 8).fingerprint != before


def test_digits_have_one_fingerprint_and_describe_themselves():
    data = fn.load_dataset("digits")
    found = data.description()
    assert found["fingerprint"] == fn.load_dataset("digits").fingerprint
    assert (found["train_images"], found["test_images"]) == (1438, 359)
    assert found["classes"] == list("0123456789")
    assert found["image_size"] == 8
