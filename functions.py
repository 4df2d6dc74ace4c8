"""What any experiment on images would say, and the one door to images/ and machinery/.

In this order: normalisation, the NT-Xent loss, classification, evaluation (features, k-NN,
accuracy per class), tables and figures. What the papers are about, the recurrent network and
SimCLR, stands in the scripts; where images come from, in images/; what keeps a run safe, in
machinery/.

Tensors are written with their shapes: N images in a set, B in a batch, C channels, H x W pixels,
D features.
"""

from __future__ import annotations

import functools
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# The door: what the scripts call of images/ and machinery/, they find here.
from images.sets import (  # noqa: F401
    ImageDataset,
    complement,
    hold_out,
    leave_out,
    load_dataset,
    per_class_subset,
    stratified_split,
    stratified_subset,
)
from machinery import trials  # noqa: F401
from machinery.batches import Batches, Subset, mix_seed  # noqa: F401
from machinery.checkpoints import load_checkpoint  # noqa: F401
from machinery.command_line import (  # noqa: F401
    BELOW_1,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    PROBABILITY,
    SHARE,
    UTF_8,
    LongRun,
    RunConfig,
    Settings,
    SeveralDevices,
    at_least,
    command_line,
    is_first_process,
    listed,
    load_config,
    parse_config,
    save_config,
)
from machinery.devices import (  # noqa: F401
    REDUCED,
    Machine,
    free_memory,
    note,
    prepare_device,
    take_gpu,
)
from machinery.durations import format_time  # noqa: F401
from machinery.errors import Diverged, UserError, check, is_out_of_memory  # noqa: F401
from machinery.files import save_torch, write_atomically, write_csv  # noqa: F401
from machinery.output import lasting_output, shown, width  # noqa: F401
from machinery.run_folder import Run  # noqa: F401
from machinery.training import (  # noqa: F401
    AveragedWeights,
    Checkpoints,
    EpochLog,
    every_step,
    fit,
    make_trainer,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# ------------------------------------------------------------------------------------------------
# Normalisation
# ------------------------------------------------------------------------------------------------


class Normalize(nn.Module):
    """Each channel to mean 0 and deviation 1, as measured on `images`, the training images only.

    Built from uint8 (N, C, H, W), or a Subset of such. uint8, or float32 in [0, 1]: (B, C, H, W)
    -> float32 (B, C, H, W). A constant channel is only centred.
    """

    mean: Tensor  # (C, 1, 1), in units of 1 = white
    std: Tensor

    def __init__(self, images: Tensor | Subset) -> None:
        super().__init__()
        # From a histogram of the 256 values: exact, and without a float copy of the whole set.
        levels = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
        for start in range(0, len(images), 4096):
            for count, channel in zip(counts, images[start : start + 4096].unbind(1), strict=True):
                count += torch.bincount(channel.flatten(), minlength=256)
        p = counts / counts[:1].sum(dtype=torch.float64)  # (C, 256)
        mean = p @ levels
        std = (p @ levels**2 - mean**2).clamp_min(0).sqrt()

        self.register_buffer("mean", mean.float().view(-1, 1, 1))
        self.register_buffer("std", torch.where(std > 1e-6, std, 1.0).float().view(-1, 1, 1))

    @classmethod
    def of(cls, mean: Tensor, std: Tensor) -> Normalize:
        """With statistics that were measured before: C numbers each, in units of 1 = white."""
        normalize = cls(torch.zeros(1, mean.numel(), 1, 1, dtype=torch.uint8))
        normalize.mean.copy_(mean.view(-1, 1, 1))
        normalize.std.copy_(std.view(-1, 1, 1))
        return normalize

    def record(self) -> dict[str, list[float]]:
        """Mean and deviation of each channel, for results.json."""
        return {name: getattr(self, name).flatten().tolist() for name in ("mean", "std")}

    def forward(self, images: Tensor) -> Tensor:
        white = 255 if images.dtype == torch.uint8 else 1
        return (images.float() * (1 / (white * self.std))).sub_(self.mean / self.std)


# ------------------------------------------------------------------------------------------------
# NT-Xent
# ------------------------------------------------------------------------------------------------


def nt_xent_loss(embeddings: Tensor, temperature: float = 0.5, block: int | None = None) -> Tensor:
    """SimCLR's loss, averaged over all 2N anchors.

    Equation 1 and Algorithm 1 of Chen et al. 2020 (arXiv 2002.05709), with sim the cosine:

        l(i, j) = -log( exp(sim(z_i, z_j) / tau) / sum over k != i of exp(sim(z_i, z_k) / tau) )

    embeddings: (2N, D), any float type; rows i and i + N are the two views of image i, and need
    not be normalised. temperature: tau > 0. Returns a scalar, computed in float32 (float64 stays
    float64), also under autocast. The positive stands once in the denominator. Raises ValueError
    for an odd number of rows or a temperature <= 0.

    The (2N, 2N) similarities are never held at once, only `block` rows of them (512 on the CPU,
    4,096 on a GPU): memory grows with N, not N^2. The value does not depend on the block but for
    rounding. The gradient is of first order only.
    """
    if embeddings.ndim != 2 or len(embeddings) % 2 or len(embeddings) == 0:
        shape = tuple(embeddings.shape)
        raise ValueError(f"embeddings must be (2N, D) with N >= 1, got {shape}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least one row, got {block}")

    with torch.autocast(embeddings.device.type, enabled=False):
        z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        z = F.normalize(z, dim=1)  # (2N, D) unit vectors, whose products are cosines
        return NTXent.apply(z, temperature, block or (512 if z.device.type == "cpu" else 4096))


class NTXent(torch.autograd.Function):
    """Eq. 1 on unit vectors z (2N, D), and its gradient while each block of rows is at hand.

    With p_ik the softmax over k != i of sim(z_i, z_k) / tau, and z_i+ the positive of z_i, the
    loss is the mean of -log p_ii+, and

        d loss / d z_i = (sum over k of (p_ik + p_ki) z_k - 2 z_i+) / (2N tau)
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float, block: int) -> Tensor:
        two_n = len(z)
        # The positive of i is i + N, and that of i + N is i.
        positive = torch.arange(two_n, device=z.device).roll(two_n // 2)
        loss = z.new_zeros(())
        gradient = torch.zeros_like(z)

        for start in range(0, two_n, block):
            rows = slice(start, start + block)
            logits = (z[rows] / temperature) @ z.T  # (block, 2N): sim(z_i, z_k) / tau
            logits.diagonal(start).fill_(-torch.inf)  # k != i
            log_p = torch.log_softmax(logits, dim=1)
            loss -= log_p.gather(1, positive[rows].unsqueeze(1)).sum()

            if ctx.needs_input_grad[0]:
                p = log_p.exp_()
                gradient[rows].addmm_(p, z)  # sum over k of p_ik z_k, for the anchors i
                gradient.addmm_(p.T, z[rows])  # sum over k of p_ki z_k, for all others

        gradient.sub_(z[positive], alpha=2).div_(two_n * temperature)
        ctx.save_for_backward(gradient)
        return loss / two_n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None


# ------------------------------------------------------------------------------------------------
# Classification
# ------------------------------------------------------------------------------------------------


def random_crop_and_flip(images: Tensor, padding: int, flip: float) -> Tensor:
    """Shift each image by up to `padding` pixels, and mirror it with probability `flip`.

    (B, C, H, W) -> (B, C, H, W), of the same dtype, device and values as `images`, black beyond
    the edge. The usual augmentation of CIFAR-10 (He et al. 2016, Section 4.2, with a padding of
    4): pad on all sides, then cut out the old size at random.
    """
    n, _, height, width = images.shape
    device = images.device
    if padding:
        padded = F.pad(images, [padding] * 4)
        # All windows of the old size, as a view: (B, C, tops, lefts, H, W).
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        top, left = torch.randint(2 * padding + 1, (2, n), device=device)
        images = windows[torch.arange(n, device=device), :, top, left]
    if flip:
        mirrored = torch.rand(n, 1, 1, 1, device=device) < flip
        images = torch.where(mirrored, images.flip(3), images)
    return images


class Classification(lightning.LightningModule):
    """Cross-entropy training of `model` on (inputs, labels), with loss and accuracy on both splits.

    Subclasses say what the model sees (`forward`) and how it is optimised
    (`configure_optimizers`). `held_out` names the second split: "validation" or "test".
    """

    def __init__(
        self, model: nn.Module, train: Batches, evaluate: Batches, held_out: str = "validation"
    ) -> None:
        super().__init__()
        self.model = model
        self.train_batches = train
        self.evaluate_batches = evaluate
        self.held_out = held_out

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def train_dataloader(self) -> Batches:
        return self.train_batches.to(self.device)

    def val_dataloader(self) -> Batches:
        return self.evaluate_batches.to(self.device)

    def _step(
        self, batch: tuple[Tensor, Tensor], label_smoothing: float = 0.0
    ) -> dict[str, Tensor]:
        inputs, labels = batch
        logits = self(inputs)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch)  # averaged over the epoch by EpochLog

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        values = {f"{self.held_out}_{name}": value for name, value in self._step(batch).items()}
        self.log_dict(values, batch_size=len(batch[1]), logger=False)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_features(
    model: nn.Module, images: Tensor | Subset, machine: Machine, batch_size: int = 500
) -> Tensor:
    """What `model` makes of un-augmented images, in eval mode.

    uint8 (N, C, H, W) -> float32 (N, D) on the CPU. For an encoder these are the representations
    h = f(x): computed once, read by every evaluation. The model is left on the CPU, each of its
    parts in the mode that it was in.
    """
    modes = [(part, part.training) for part in model.modules()]
    prepare_device(machine)
    model.eval().to(machine.device)

    batches = Batches(images, batch_size=batch_size)
    bar = tqdm(batches, "features", leave=False, disable=not sys.stdout.isatty())
    with machine.autocast():
        features = [model(batch.to(machine.device)).float().cpu() for (batch,) in bar]

    for part, mode in modes:
        part.training = mode
    model.cpu()
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
    """Weighted k-nearest-neighbour classification by cosine similarity.

    Each of the k nearest images in the bank votes for its class with weight
    exp(similarity / temperature) (Wu et al. 2018, arXiv 1805.01978, Section 3.4).

    queries (Q, D), bank (N, D), bank_labels int64 (N,) -> predicted classes int64 (Q,). k is at
    most N. Works through `block` queries at a time: memory grows with block * N, not Q * N.
    """
    bank = F.normalize(bank.float(), dim=1)
    k = min(k, len(bank))
    predictions = []
    # One buffer for all blocks, so that the heap does not fragment.
    buffer = bank.new_empty(min(block, len(queries)), len(bank))

    for part in queries.split(block):
        part = F.normalize(part.float(), dim=1)
        similarity = torch.mm(part, bank.T, out=buffer[: len(part)])  # (block, N)
        nearest, index = similarity.topk(k, dim=1)  # (block, k)

        # Relative to the nearest's: never infinite, and the same winner.
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = torch.zeros(len(part), num_classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[index], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The fraction of right predictions; both int64 (N,)."""
    return int((predictions == labels).sum()) / len(labels)


def accuracy_per_class(
    predictions: Tensor, labels: Tensor, classes: Sequence[str]
) -> dict[str, float | None]:
    """The fraction of each class's images that were recognised; None for a class without images.

    predictions, labels: int64 (N,).
    """
    members = {name: labels == i for i, name in enumerate(classes)}
    return {
        name: accuracy(predictions[chosen], labels[chosen]) if chosen.any() else None
        for name, chosen in members.items()
    }


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def percent(fraction: float) -> str:
    """A fraction of 1 for people: 0.4567 is 45.7 %."""
    return f"{100 * fraction:.1f} %"


def print_columns(rows: Sequence[Sequence[str]], indent: int = 2, left: int = 0) -> None:
    """Print rows of texts as a table: first column (and column `left`) flush left, others right."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for i, (text, wide) in enumerate(zip(row, widths, strict=True)):
            blank = " " * (wide - width(text))
            cells.append(text + blank if i in (0, left) else blank + text)
        print(" " * indent + "   ".join(cells).rstrip())


def print_per_class(per_class: dict[str, float | None]) -> None:
    """Print the accuracy of each class, best first, and name the worst three."""
    there = ((value, shown(name)) for name, value in per_class.items() if value is not None)
    ranked = sorted(there, reverse=True)
    some = ranked if len(ranked) <= 20 else ranked[:3]
    rows = [(name, percent(value), "#" * round(30 * value)) for value, name in some]
    print_columns(rows, indent=4, left=2)
    if len(ranked) > 20:
        print(f"    ... and {len(ranked) - 3} more in results.json")
    worst = [f"{name} {percent(value)}" for value, name in reversed(ranked[-3:])]
    print(f"  hardest classes: {', '.join(worst)}")


# ------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------


def drawing(plot: Callable[Parameters, Result]) -> Callable[Parameters, Result | None]:
    """Decorate a function that draws: a figure that fails costs one line, never a number.

    What it returns is passed on, None if it failed. A full disk is another matter: CannotWrite is
    passed on.
    """

    @functools.wraps(plot)
    def drawn(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result | None:
        try:
            return plot(*args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # a name that no font has, features that are no numbers
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"note: {plot.__name__} could not draw its figure ({reason})", file=sys.stderr)
            return None

    return drawn


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """A matplotlib figure of `columns` axes side by side, sizes in inches.

    Without pyplot: no display, and no global state.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plain(name: str, most: int = 24) -> str:
    """A name as matplotlib should show it: short, `$` starts no formula, `_` hides no entry."""
    return shown(name, most).replace("$", r"\$").replace("_", " ").strip() or "?"


def save_figure(figure: Figure, file: Path) -> None:
    """Save as PNG and print its path."""
    with warnings.catch_warnings():
        # A name in another script.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer := io.BytesIO(), format="png", dpi=120, bbox_inches="tight")
    write_atomically(file, buffer.getvalue())
    print(f"  figure {file}")


def in_percent(axis: Any) -> None:
    """Show an axis of fractions of 1 in percent."""
    axis.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:g} %")


def of_accuracy(axis: Any) -> None:
    """Show an axis of accuracies in percent, over 5 points at least: noise stays small.

    To be called once the curves are drawn.
    """
    in_percent(axis)
    low, high = axis.get_ylim()
    if high - low < 0.05:
        middle = min(max((low + high) / 2, 0.02), 0.98)
        axis.set_ylim(middle - 0.025, middle + 0.025)


def over_epochs(axis: Any, ylabel: str, accuracy: bool = False) -> None:
    """Dress an axis of curves over the epochs: whole epochs, a light grid, accuracy in percent."""
    from matplotlib.ticker import MaxNLocator

    axis.set(xlabel="epoch", ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if accuracy:
        of_accuracy(axis)


@drawing
def plot_curves(
    runs: dict[str, list[dict[str, float]]], held_out: str, file: Path, title: str
) -> None:
    """Loss and accuracy over the epochs: training images dashed, held-out ones, if any, solid.

    runs: {name: its rows of an EpochLog}, a colour each.
    """
    figure, axes = new_figure(10, 4, columns=2)
    for axis, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            epochs = [row["epoch"] for row in rows]
            run = f"{name}, " if len(runs) > 1 else ""
            marker = "o" if len(rows) <= 10 else ""
            for split, style in (("train", "--"), (held_out, "-")):
                values = [row.get(f"{split}_{quantity}") for row in rows]
                look = {"color": f"C{i}", "marker": marker, "markersize": 4}
                if None not in values:
                    axis.plot(epochs, values, style, label=run + split, **look)
        over_epochs(axis, quantity, accuracy=quantity == "accuracy")

    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(plain(title, most=80))
    save_figure(figure, file)


@drawing
def plot_confusion_matrix(
    predictions: Tensor, labels: Tensor, classes: Sequence[str], file: Path, title: str
) -> None:
    """Rows are true classes, columns predicted ones, in percent of the true class.

    predictions, labels: int64 (N,).
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    known = range(len(classes))
    matrix = 100 * confusion_matrix(labels, predictions, labels=known, normalize="true")
    many = len(classes) > 20  # then numbers and names would not be legible
    names = None if many else [plain(name) for name in classes]

    figure, axis = new_figure(7.4, 6.4)
    ConfusionMatrixDisplay(matrix, display_labels=names).plot(
        ax=axis,
        cmap="Blues",
        values_format=".0f",
        include_values=not many,
        colorbar=False,
        im_kw={"vmin": 0},
    )
    axis.set(title=f"{title}, % of each class", xlabel="predicted", ylabel="true")
    axis.spines[["top", "right"]].set_visible(True)
    if many:
        axis.set(xticks=[], yticks=[])
    else:
        axis.tick_params(axis="x", rotation=45 if max(map(len, names or [])) > 3 else 0)
    save_figure(figure, file)


def dot_size(count: int) -> float:
    """How large the dots of a map are, in matplotlib's points squared: the more, the smaller."""
    return max(2, min(14, 20000 / count))


@drawing
def plot_tsne(
    points: np.ndarray, labels: Tensor, classes: Sequence[str], file: Path, title: str
) -> None:
    """A scatter of two-dimensional points, a colour per class. points (N, 2), labels int64 (N,)."""
    from matplotlib import colormaps

    figure, axis = new_figure(8.2, 6.6)
    size = dot_size(len(points))
    few = len(classes) <= 10
    colors = colormaps["tab10" if few else "gist_ncar"]
    for i, name in enumerate(classes):
        color = colors(i if few else i / len(classes))
        chosen = (labels == i).numpy()
        axis.scatter(*points[chosen].T, s=size, color=color, alpha=0.7, lw=0, label=plain(name))

    if len(classes) <= 20:
        legend = axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        for handle in legend.legend_handles:
            handle.set(sizes=[50], alpha=1)
    axis.set(title=title, xticks=[], yticks=[])
    axis.spines[["left", "bottom"]].set_visible(False)
    save_figure(figure, file)
