"""What the three scripts share: whatever any experiment on small images would want.

In this order: user errors and the command line, the run folder, data sets, batches, the NT-Xent loss,
training with Lightning, evaluation (features, k-NN, accuracy per class) and figures.
What the papers are about (the recurrent network, SimCLR's augmentations and model) stands in the scripts.

Tensors are written with their shapes: N images in a set, B in a batch, C channels, H x W pixels, D features.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# The one door to machinery/: the scripts find here what they call of it.
from machinery.batches import Batches, mix_seed, on_device  # noqa: F401
from machinery.command_line import (  # noqa: F401
    RunConfig,
    as_yaml,
    command_line,
    is_first_process,
    make_parser,
    newest_run,
    parse_config,
    save_config,
)
from machinery.devices import (  # noqa: F401
    describe_machine,
    prepare_device,
    resolve_device,
    resolve_precision,
    started_together,
)
from machinery.errors import CannotWrite, Diverged, TimeIsUp, UserError, check, is_out_of_memory  # noqa: F401
from machinery.files import locked, save_torch, write_atomically, write_csv  # noqa: F401
from machinery.run_folder import finished, run_folder, save_results, start_record  # noqa: F401
from machinery.training import (  # noqa: F401
    STARTED,
    Checkpoints,
    EpochLog,
    fit,
    format_time,
    load_checkpoint,
    make_trainer,
    newest_sound,
    parse_duration,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# ------------------------------------------------------------------------------------------------
# Data sets
# ------------------------------------------------------------------------------------------------


@dataclass
class ImageDataset:
    """A set of images in memory. images: uint8 (N, C, H, W); labels: int64 (N,), an index into `classes`."""

    name: str
    train_images: Tensor
    train_labels: Tensor | None
    test_images: Tensor | None
    test_labels: Tensor | None
    classes: tuple[str, ...]
    unlabelled_images: Tensor | None = None

    @property
    def pretraining_images(self) -> Tensor:
        """The images that need no labels: the set's unlabelled ones if it has some, else the training images."""
        return self.train_images if self.unlabelled_images is None else self.unlabelled_images

    def labelled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(train images, train labels, test images, test labels). Raises UserError where the set lacks one of them."""
        if self.train_labels is None or self.test_images is None or self.test_labels is None:
            raise UserError(
                f"--dataset {self.name} has no classes or no test images, which this needs: lay them out as "
                f"{self.name}/train/<class>/* and {self.name}/test/<class>/*, or run --stages pretrain alone"
            )
        check(len(self.classes) > 1, f"--dataset {self.name} has one class only, where telling classes apart needs two")
        return self.train_images, self.train_labels, self.test_images, self.test_labels


def load_dataset(name: str, data_dir: str | Path = "data", image_size: int | None = None) -> ImageDataset:
    """Load a data set by name, or a folder of images (made square, `image_size` pixels a side, 32 unless given).

    Downloads CIFAR-10/100 and STL-10 into `data_dir` when they are not there. Raises UserError.
    """
    if name == "digits":
        return _load_digits()
    if name in ("cifar10", "cifar100", "stl10"):
        try:
            with locked(Path(data_dir)):  # two processes must not download it at once
                return _load_torchvision(name, Path(data_dir))
        except OSError as error:
            raise UserError(f"--data_dir {data_dir} cannot be used ({error.strerror}): name another folder") from None
    check(Path(name).is_dir(), f"--dataset {name}: no such folder, and not one of cifar10, cifar100, stl10, digits")
    return _load_folder(Path(name), Path(data_dir), image_size or 32)


def _load_digits() -> ImageDataset:
    """scikit-learn's 1,797 real 8 x 8 scans of handwritten digits, as grey RGB; every fifth is a test image."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = torch.from_numpy(scans.images * (255 / 16)).round().to(torch.uint8)  # (N, 8, 8), 0...16 in the file
    images, labels = images[:, None].repeat(1, 3, 1, 1), torch.from_numpy(scans.target).long()
    test = stratified_subset(labels, 0.2, seed=0)
    train = complement(test, len(labels))
    return ImageDataset("digits", images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _load_torchvision(name: str, data_dir: Path) -> ImageDataset:
    import socket

    from torchvision import datasets

    archive = "stl10_binary.tar.gz" if name == "stl10" else f"{name.replace('cifar', 'cifar-')}-python.tar.gz"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(8)  # torchvision sets none: without a network it could wait for ever
    try:
        if name == "stl10":
            splits = [datasets.STL10(str(data_dir), s, download=s == "train") for s in ("train", "test", "unlabeled")]
            train, test, unlabelled = ((torch.from_numpy(s.data), torch.from_numpy(s.labels).long()) for s in splits)
            return ImageDataset(name, *train, *test, tuple(splits[0].classes), unlabelled[0])
        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        splits = [kind(str(data_dir), train=is_train, download=True) for is_train in (True, False)]
        planes = [torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous() for s in splits]
        train, test = ((images, torch.tensor(s.targets)) for images, s in zip(planes, splits, strict=True))
        return ImageDataset(name, *train, *test, tuple(splits[0].classes))
    except Exception as error:  # of the network, the disk, or a damaged archive
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--dataset {name} is not in {data_dir} and could not be downloaded ({reason}): put "
            f"{archive} into {data_dir}, or run without it: python {Path(sys.argv[0]).name} --dataset digits"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _load_folder(folder: Path, data_dir: Path, size: int) -> ImageDataset:
    """A folder of the user's own images: train/<class>/* and test/<class>/*, or images alone (no classes)."""
    name = str(folder)
    if not (folder / "train").is_dir():
        files = sorted(path for path in folder.iterdir() if not path.is_dir() and _is_visible(path.relative_to(folder)))
        check(bool(files), f"--dataset {folder} has neither images in it nor a folder train/<class>/ with images")
        return ImageDataset(name, _decode(folder, files, data_dir, size), None, None, None, ())
    files, labels, classes = _class_files(folder / "train")
    n = len(files)
    if not (folder / "test").is_dir():
        return ImageDataset(name, _decode(folder, files, data_dir, size), labels, None, None, classes)
    test_files, test_labels, test_classes = _class_files(folder / "test")
    unknown = sorted(set(test_classes) - set(classes))
    check(not unknown, f"--dataset {folder}: test/ has classes that train/ lacks: {', '.join(unknown)}")
    test_labels = torch.tensor([classes.index(test_classes[label]) for label in test_labels])
    images = _decode(folder, files + test_files, data_dir, size)
    return ImageDataset(name, images[:n], labels, images[n:], test_labels, classes)


def _is_visible(path: Path) -> bool:
    """Every file counts as an image but those that systems hide: what is none is found on decoding, and named."""
    return not any(part.startswith(".") for part in path.parts) and path.name.lower() not in (
        "thumbs.db",
        "desktop.ini",
    )


def _class_files(split: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """The files below split/<class>/, the class of each, int64 (N,), and the names of classes that have any."""
    files = sorted(path for path in split.glob("*/**/*") if not path.is_dir() and _is_visible(path.relative_to(split)))
    check(bool(files), f"--dataset: no images in {split}/<class>/")
    names = [path.relative_to(split).parts[0] for path in files]
    classes = sorted(set(names))  # an empty folder is no class
    return files, torch.tensor([classes.index(name) for name in names]), tuple(classes)


def _decode(folder: Path, files: list[Path], data_dir: Path, size: int) -> Tensor:
    """Decode files to uint8 (N, 3, size, size), once: cached under a key of every path, length and time of change."""
    key = hashlib.sha256(f"1 {size} ".encode() + os.fsencode(folder.resolve()))
    for file in files:
        stat = file.stat()
        key.update(os.fsencode(file.relative_to(folder)) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    cache = data_dir / "cache" / f"{folder.resolve().name}-{size}px-{key.hexdigest()[:16]}.pt"
    if cache.is_file():
        with contextlib.suppress(Exception):  # a damaged cache is decoded afresh, and overwritten
            images = torch.load(cache, weights_only=True, mmap=True)
            if images.shape == (len(files), 3, size, size) and images.dtype == torch.uint8:
                return images
    print(f"decoding {len(files):,} images of {folder} (once; kept in {cache})", flush=True)
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # read_image refuses such files itself
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
    """Decode one image file of any mode and orientation to RGB, uint8 (size, size, 3): scaled, then cropped centrally.

    Raises UserError that names the file when it is no image, is damaged, or is absurdly large.
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
                upright = Image.fromarray((levels >> 8 if levels.max() > 255 else levels).astype(np.uint8))
            if upright.mode in ("P", "PA", "LA", "RGBA") or "transparency" in upright.info:  # shown on white
                rgba = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            rgb = upright.convert("RGB")
            if rgb.size != (size, size):
                rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
            return np.asarray(rgb)
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = str(error).replace(str(file), "the file")
        raise UserError(f"{file} is not an image that can be read ({reason}): replace or remove it") from None


def stratified_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices, int64 (M,), sorted, of `fraction` of each class (rounded, at least one image), fixed by the seed.

    labels: int64 (N,). For the validation split and few-label subsets. Raises ValueError unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(fraction * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def complement(indices: Tensor, n: int) -> Tensor:
    """The indices of 0...n-1, int64, sorted, that are not in `indices`."""
    rest = torch.ones(n, dtype=torch.bool)
    rest[indices] = False
    return rest.nonzero().flatten()


class Normalize(nn.Module):
    """Each channel to mean 0 and deviation 1, measured on `images`: uint8 (N, C, H, W), the training images only.

    uint8, or float32 in [0, 1]: (B, C, H, W) -> float32 (B, C, H, W). A constant channel is only centred.
    """

    mean: Tensor  # (C, 1, 1), in units of 1 = white
    std: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        levels = torch.arange(256, dtype=torch.float64) / 255
        # From a histogram of the 256 values: exact, and without a float copy of the whole set.
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
        p = counts / counts[:1].sum(dtype=torch.float64)  # (C, 256)
        mean = p @ levels
        std = (p @ levels**2 - mean**2).clamp_min(0).sqrt()
        self.register_buffer("mean", mean.float().view(-1, 1, 1))
        self.register_buffer("std", torch.where(std > 1e-6, std, 1.0).float().view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        white = 255 if images.dtype == torch.uint8 else 1
        return (images.float() * (1 / (white * self.std))).sub_(self.mean / self.std)


# ------------------------------------------------------------------------------------------------
# NT-Xent
# ------------------------------------------------------------------------------------------------


def nt_xent_loss(embeddings: Tensor, temperature: float = 0.5, block: int | None = None) -> Tensor:
    """SimCLR's loss, Eq. 1 and Algorithm 1 of Chen et al. 2020 (arXiv 2002.05709), averaged over all 2N anchors.

        l(i, j) = -log( exp(sim(z_i, z_j) / tau) / sum over k != i of exp(sim(z_i, z_k) / tau) )

    embeddings: (2N, D), any float type; rows i and i + N are the two views of image i, and need not be normalised.
    temperature: tau > 0. Returns a scalar, computed in float32 (float64 stays float64), also under autocast.
    The positive stands once in the denominator. Raises ValueError for an odd number of rows or a temperature <= 0.

    The (2N, 2N) similarities are never held at once, only `block` rows of them (512 on the CPU, 4,096 on a GPU): memory
    grows with N, not N^2. The value does not depend on the block but for rounding. The gradient is of first order only.
    """
    if embeddings.ndim != 2 or len(embeddings) % 2 or len(embeddings) == 0:
        raise ValueError(f"embeddings must be (2N, D) with N >= 1, got {tuple(embeddings.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least one row, got {block}")
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)  # (2N, D)
        return NTXent.apply(z, temperature, block or (512 if z.device.type == "cpu" else 4096))


class NTXent(torch.autograd.Function):
    """Eq. 1 on unit vectors z (2N, D), with its gradient computed on the way, while each block of rows is at hand.

    With p_ik the softmax over k != i of sim(z_i, z_k) / tau, and z_i+ the positive of z_i, the loss is the mean of
    -log p_ii+, and  d loss / d z_i = (sum over k of (p_ik + p_ki) z_k - 2 z_i+) / (2N tau).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, block: int) -> Tensor:
        two_n = len(z)
        positive = torch.arange(two_n, device=z.device).roll(two_n // 2)  # i's positive is i + N, and i + N's is i
        loss, gradient = z.new_zeros(()), torch.zeros_like(z)
        for start in range(0, two_n, block):
            rows = slice(start, start + block)
            logits = (z[rows] / temperature) @ z.T  # (block, 2N): sim(z_i, z_k) / tau, cosine similarity
            logits.diagonal(start).fill_(-torch.inf)  # k != i
            log_p = torch.log_softmax(logits, dim=1)
            loss -= log_p.gather(1, positive[rows].unsqueeze(1)).sum()
            if ctx.needs_input_grad[0]:
                p = log_p.exp_()
                gradient[rows].addmm_(p, z)
                gradient.addmm_(p.T, z[rows])
        ctx.save_for_backward(gradient.sub_(z[positive], alpha=2).div_(two_n * temperature))
        return loss / two_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None


# ------------------------------------------------------------------------------------------------
# Training with Lightning
# ------------------------------------------------------------------------------------------------


class Classification(lightning.LightningModule):
    """Cross-entropy training of `model` on (inputs, labels); measures loss and accuracy on the held-out batches too.

    Subclasses say what the model sees (`forward`) and how it is optimised (`configure_optimizers`).
    `held_out` names the second split in the metrics: "validation" or "test".
    """

    def __init__(self, model: nn.Module, train: Batches, evaluate: Batches, held_out: str = "validation") -> None:
        super().__init__()
        self.model, self.train_batches, self.evaluate_batches, self.held_out = model, train, evaluate, held_out

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def train_dataloader(self) -> Batches:
        return on_device(self.train_batches, self.device)

    def val_dataloader(self) -> Batches:
        return on_device(self.evaluate_batches, self.device)

    def _step(self, batch: tuple[Tensor, Tensor], label_smoothing: float = 0.0) -> dict[str, Tensor]:
        inputs, labels = batch
        logits = self(inputs)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing), "accuracy": accuracy}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch)  # averaged over the epoch by EpochLog

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        values = {f"{self.held_out}_{name}": value for name, value in self._step(batch).items()}
        self.log_dict(values, batch_size=len(batch[1]), logger=False)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_features(model: nn.Module, images: Tensor, config: RunConfig, batch_size: int = 500) -> Tensor:
    """What `model` makes of un-augmented images, in eval mode: uint8 (N, C, H, W) -> float32 (N, D) on the CPU.

    For an encoder these are the representations h = f(x): computed once, read by k-NN, linear probe and t-SNE.
    The model's mode and device are put back afterwards.
    """
    device, was_training = resolve_device(config.accelerator), model.training
    prepare_device(config)
    reduced = resolve_precision(config.precision, device) == "bf16"
    model.eval().to(device)
    with torch.autocast(device, torch.bfloat16, enabled=reduced):
        batches = Batches(images, batch_size=batch_size)
        bar = tqdm(batches, "features", leave=False, disable=not sys.stdout.isatty())
        features = [model(batch.to(device)).float().cpu() for (batch,) in bar]
    model.train(was_training).cpu()
    return torch.cat(features)


@torch.no_grad()
def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
    block: int = 512,
) -> Tensor:
    """Weighted k-nearest-neighbour classification by cosine similarity (Wu et al. 2018, arXiv 1805.01978, section 3.4).

    Each of the k nearest images in the bank votes for its class with weight exp(similarity / temperature).
    queries (Q, D), bank (N, D), bank_labels int64 (N,) -> predicted classes int64 (Q,). k is at most N.
    Works through `block` queries at a time: memory grows with block * N, not Q * N.
    """
    bank, k = F.normalize(bank.float(), dim=1), min(k, len(bank))
    predictions = []
    buffer = bank.new_empty(min(block, len(queries)), len(bank))  # one for all blocks: the heap does not fragment
    for part in queries.split(block):
        similarity = torch.mm(F.normalize(part.float(), dim=1), bank.T, out=buffer[: len(part)])  # (block, N)
        nearest, index = similarity.topk(k, dim=1)  # (block, k)
        votes = torch.zeros(len(part), num_classes, device=bank.device)
        weights = ((nearest - nearest[:, :1]) / temperature).exp()  # relative to the nearest's: never infinite
        votes.scatter_add_(1, bank_labels[index], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The fraction of right predictions; both int64 (N,)."""
    return int((predictions == labels).sum()) / len(labels)


def accuracy_per_class(predictions: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, float | None]:
    """The fraction of each class's images that were recognised; None for a class without images. Both int64 (N,)."""
    members = {name: labels == i for i, name in enumerate(classes)}
    return {name: accuracy(predictions[m], labels[m]) if m.any() else None for name, m in members.items()}


def print_per_class(per_class: dict[str, float | None]) -> None:
    """Print the accuracy of each class, best first, and name the worst three."""
    ranked = sorted(((v, name) for name, v in per_class.items() if v is not None), reverse=True)
    width = max(len(name) for _, name in ranked)
    for value, name in ranked if len(ranked) <= 20 else ranked[:3]:
        print(f"    {name:{width}}  {100 * value:5.1f} %  {'#' * round(30 * value)}")
    if len(ranked) > 20:
        print(f"    ... and {len(ranked) - 3} more in results.json")
    print("  hardest classes: " + ", ".join(f"{name} {100 * value:.1f} %" for value, name in reversed(ranked[-3:])))


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """A matplotlib figure of `columns` axes side by side, sizes in inches. No pyplot, no display, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plain(name: str) -> str:
    """A class name as matplotlib should show it: `$` starts no formula, `_` hides no legend entry."""
    return name.replace("$", r"\$").replace("_", " ").strip() or "_"


def save_figure(figure: Figure, file: Path) -> None:
    """Save as PNG and print its path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name in another script
        figure.savefig(buffer := io.BytesIO(), format="png", dpi=120, bbox_inches="tight")
    write_atomically(file, buffer.getbuffer())
    print(f"  figure {file}")


def in_percent(axis: Any) -> None:
    """Show an axis of fractions of 1 in percent."""
    axis.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:g} %")


def over_epochs(axis: Any, ylabel: str, percent: bool = False) -> None:
    """Dress an axis of curves over the epochs: whole epochs, a light grid, percent where it shows fractions of 1."""
    from matplotlib.ticker import MaxNLocator

    axis.set(xlabel="epoch", ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if percent:
        in_percent(axis)


def plot_curves(runs: dict[str, list[dict[str, float]]], held_out: str, file: Path, title: str) -> None:
    """Loss and accuracy of the training (dashed) and held-out (solid) images over the epochs; a colour per run."""
    figure, axes = new_figure(10, 4, columns=2)
    for axis, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            epochs = [row["epoch"] for row in rows]
            label, marker = (f"{name}, " if len(runs) > 1 else ""), "o" if len(rows) <= 10 else ""
            for split, style in (("train", "--"), (held_out, "-")):
                values = [row[f"{split}_{quantity}"] for row in rows]
                axis.plot(epochs, values, style, color=f"C{i}", label=label + split, marker=marker, markersize=4)
        over_epochs(axis, quantity, percent=quantity == "accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(plain(title))
    save_figure(figure, file)


def plot_confusion_matrix(predictions: Tensor, labels: Tensor, classes: Sequence[str], file: Path, title: str) -> None:
    """Rows are true classes, columns predicted ones, in percent of the true class. predictions, labels: int64 (N,)."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    many = len(classes) > 20  # then numbers and names would not be legible
    matrix = 100 * confusion_matrix(labels, predictions, labels=range(len(classes)), normalize="true")
    figure, axis = new_figure(7.4, 6.4)
    display = ConfusionMatrixDisplay(matrix, display_labels=None if many else [plain(name) for name in classes])
    display.plot(ax=axis, cmap="Blues", values_format=".0f", include_values=not many, colorbar=False, im_kw={"vmin": 0})
    axis.set(title=f"{title}, % of each class", xlabel="predicted", ylabel="true")
    axis.spines[["top", "right"]].set_visible(True)
    if many:
        axis.set(xticks=[], yticks=[])
    else:
        axis.tick_params(axis="x", rotation=45 if max(map(len, classes)) > 3 else 0)
    save_figure(figure, file)


def plot_tsne(points: np.ndarray, labels: Tensor, classes: Sequence[str], file: Path, title: str) -> None:
    """A scatter of two-dimensional points, a colour per class. points (N, 2), labels int64 (N,)."""
    from matplotlib import colormaps

    figure, axis = new_figure(8.2, 6.6)
    size = max(2, min(14, 20000 / len(points)))
    colors = colormaps["tab10" if len(classes) <= 10 else "gist_ncar"]
    for i, name in enumerate(classes):
        color = colors(i if len(classes) <= 10 else i / len(classes))
        chosen = (labels == i).numpy()
        axis.scatter(*points[chosen].T, s=size, color=color, alpha=0.7, lw=0, label=plain(name))
    if len(classes) <= 20:
        legend = axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        for handle in legend.legend_handles:
            handle.set(sizes=[50], alpha=1)
    axis.set(title=title, xticks=[], yticks=[])
    axis.spines[["left", "bottom"]].set_visible(False)
    save_figure(figure, file)
