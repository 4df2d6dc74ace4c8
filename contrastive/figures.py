"""SimCLR's own figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functions as fn
from contrastive.certainty import SHARES, Certainty
from contrastive.few_labels import UNTRAINED, FewLabels
from contrastive.scores import kept_accuracy, ranks


@fn.drawing
def plot_views(images: Tensor, views: Tensor, file: Path) -> None:
    """Images in the top row, up to four random views of each below.

    images: uint8 (N, 3, H, W). views: float32 (M N, 3, size, size) in [0, 1]; rows i, i + N ... are
    of image i. Smaller crops are shown as large as the images, each pixel a square.
    """
    from torchvision.utils import make_grid

    n, side = len(images), images.shape[-1]
    gap = max(1, side // 16)
    views = F.interpolate(views[: 4 * n], (side, side))
    rows = torch.cat([images / 255, views])  # a row of the grid each: images, first, second views
    grid = make_grid(rows, nrow=n, padding=gap, pad_value=1)

    count = len(views) // n
    figure, axis = fn.new_figure(10, 1 + 0.8 * (1 + count))
    axis.imshow(grid.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axis.set(title="What the encoder must recognise as the same image", xticks=[])
    names = ["image", *(f"view {v}" for v in range(1, count + 1))]
    axis.set_yticks([(r + 0.5) * (side + gap) for r in range(1 + count)], names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    fn.save_figure(figure, file)


@fn.drawing
def plot_pretraining(rows: list[dict[str, float]], file: Path) -> None:
    """Does it learn? The loss, how many views find their partner, and the effective rank.

    rows: of an EpochLog; what was not measured is left out.
    """
    panels = {
        "NT-Xent loss": {"train_loss": "batch"},
        "accuracy": {
            "contrastive_accuracy": "partner found (last batch)",
            "knn_accuracy": "k-NN (training images)",
        },
        "effective rank": {"rank_h": "of h", "rank_z": "of z"},
    }
    titles = ("Pretraining, without labels", "Is it learning?", "How many directions h and z use")
    marker = "o" if len(rows) <= 10 else ""
    figure, axes = fn.new_figure(13, 4, columns=3)
    color = 0
    for axis, title, (name, curves) in zip(axes, titles, panels.items(), strict=True):
        for key, label in curves.items():
            measured = [row for row in rows if key in row]
            epochs, values = ([row[part] for row in measured] for part in ("epoch", key))
            if measured:
                axis.plot(epochs, values, color=f"C{color}", marker=marker, label=label)
            color += 1
        axis.set(title=title)
        fn.over_epochs(axis, name, accuracy=name == "accuracy")
        if len(curves) > 1 and axis.get_lines():
            axis.legend(frameon=False, loc="lower right" if name == "accuracy" else "best")
    fn.save_figure(figure, file)


@fn.drawing
def plot_few_labels(
    found: dict[str, list[FewLabels]], classes: int, held_out: str, file: Path
) -> None:
    """Held-out accuracy over labels per class: the mean over the draws, in a band of one deviation.

    found: {representation: what it reached with each amount of labels}; a panel per method, a
    colour per representation. Where fine-tuned, the untrained encoder is trained from scratch.
    """
    ours = list(found.values())[-1]
    methods = list(ours[0].accuracies())
    figure, axes = fn.new_figure(4.3 * len(methods) + 2, 4, columns=len(methods))
    panels = np.atleast_1d(axes)
    for axis, method in zip(panels, methods, strict=True):
        for color, (name, amounts) in enumerate(found.items()):
            measured = sorted(
                (few.images / classes, few.accuracies()[method])
                for few in amounts
                if method in few.accuracies()
            )
            if not measured:
                continue
            if "fine-tuned" in methods and name == UNTRAINED:
                name += "\n(fine-tuned: from scratch)"
            x = [count for count, _ in measured]
            y = np.array([accuracies for _, accuracies in measured])  # (amounts, draws)
            means, spread = y.mean(axis=1), y.std(axis=1, ddof=min(1, y.shape[1] - 1))
            axis.plot(x, means, marker="o", markersize=4, color=f"C{color}", label=name)
            band = means - spread, means + spread
            axis.fill_between(x, *band, color=f"C{color}", alpha=0.2, linewidth=0)
            if len(x) == 1:  # whose band has no width
                axis.errorbar(x, means, spread, color=f"C{color}", capsize=4)
        axis.set(title=method, xlabel="labels per class (logarithmic)", xscale="log")
        axis.set_ylabel(f"{held_out} accuracy")
        counts = sorted({few.images / classes for few in ours})
        axis.set_xticks(counts, [f"{count:,.3g}" for count in counts])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)

    limits = [limit for axis in panels for limit in axis.get_ylim()]
    for axis in panels:  # the same scale in all panels
        axis.set_ylim(min(limits), max(limits))
        fn.of_accuracy(axis)
    if len(found) > 1:
        legend = panels[0].get_legend_handles_labels()
        figure.legend(*legend, loc="outside right center", frameon=False)
    fn.save_figure(figure, file)


def tsne_points(h: Tensor, seed: int) -> np.ndarray:
    """t-SNE (van der Maaten & Hinton 2008) of unit vectors, after PCA to 50 dimensions.

    (N, D), N >= 4 -> (N, 2).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points = nn.functional.normalize(h, dim=1).numpy()  # by angle, as k-NN and NT-Xent compare
    # Fifty dimensions hold nearly all of the distances, and t-SNE's search takes far less time.
    points = PCA(min(50, *points.shape), random_state=seed).fit_transform(points)
    perplexity = min(30, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=seed, n_jobs=-1).fit_transform(points)


@fn.drawing
def tsne_map(h: Tensor, held_out: str, seed: int) -> np.ndarray | None:
    """`tsne_points` of the test (or validation) images' h (N, D); None, and says so, for fewer than
    four.

    With fewer, or with features that are all the same, scikit-learn's search ends the process.
    """
    distinct = len(torch.unique(nn.functional.normalize(h, dim=1), dim=0))
    if distinct < 4:
        print(
            f"no t-SNE: it needs four different {held_out} images or more, and there are {distinct}"
        )
        return None
    print(f"t-SNE of {len(h):,} {held_out} images", flush=True)
    return tsne_points(h, seed)


# ------------------------------------------------------------------------------------------------
# How sure it is
# ------------------------------------------------------------------------------------------------


def print_certainty(found: Certainty, held_out: str) -> None:
    """A row for each way: what it is worth."""
    others = list(list(found.worth.values())[-1].others)
    rows = [["certainty", "nearest alike", "errors last", "crops", "blur", "noise"]]
    people = any(one.people is not None for one in found.worth.values())
    rows[0] += [
        *(["people"] if people else []),
        *(f"against {fn.shown(Path(other).name or other)}" for other in others),
    ]
    for name, one in found.worth.items():
        cells = [one.r_auroc, one.order, one.crops, one.blur, one.noise]
        cells += [one.people] if people else []
        cells += [one.others.get(other) for other in others]
        rows.append([name, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    print()
    fn.print_columns(rows)
    print(
        "  nearest alike: does it tell where the nearest image is of the same class (AUROC);\n"
        "  errors last: do the probe's errors come last (0: they lie anywhere, 1: all do);\n"
        "  crops, blur, noise: Spearman with how well copies of an image can be seen;"
    )
    print(
        ("  people: with how much people agree;\n" if people else "")
        + f"  against: AUROC of {held_out} images against those of another set"
    )
    before, after = map(fn.percent, found.calibration_error)
    print(
        f"  a probe on half the labels: its probabilities are off by {before}, and by {after} at\n"
        f"  temperature {found.temperature:.2f}, of the other half (expected calibration error)\n"
    )


@fn.drawing
def plot_certainty(found: Certainty, file: Path) -> None:
    """Is it right to be sure? Accuracy of the surest, certainty under crops, and calibration."""
    figure, axes = fn.new_figure(16, 4.4, columns=3)
    for color, (name, value) in enumerate(found.values.items()):
        curve = kept_accuracy(value, found.right)
        share = np.arange(1, len(curve) + 1) / len(curve)
        start = len(curve) // 50  # of a handful, accuracy is noise
        line = "--" if name == "probe's entropy" else "-"  # on that of its softmax, nearly
        axes[0].plot(share[start:], curve[start:], line, color=f"C{color}", label=name)
        if name in found.falling:
            falls = found.falling[name]
            axes[1].plot(SHARES, falls, line, color=f"C{color}", marker="o", markersize=4)
    axes[0].set(title="The probe on the surest images", xlabel="share that is kept")
    axes[0].set_ylabel("accuracy")
    fn.of_accuracy(axes[0])
    axes[1].set(title="Under crops", xlabel="share of the image that is left")
    axes[1].set_ylabel("mean rank among whole images")
    axes[1].set_xticks(SHARES)
    axes[1].invert_xaxis()

    axes[2].plot([0, 1], [0, 1], color="lightgrey")
    titles = ("as it is", f"at temperature {found.temperature:.2f}")
    shades = ("0.6", "black")  # no way to be sure has one of these
    for bins, title, error, shade in zip(
        found.bins, titles, found.calibration_error, shades, strict=True
    ):
        label = f"{title}: off by {fn.percent(error)}"
        # Of a handful of images, too, how many are right is noise.
        enough = [one[:2] for one in bins if one[2] * len(found.right) >= 20]
        points = np.array(enough).reshape(-1, 2).T
        axes[2].plot(*points, color=shade, marker="o", markersize=4, label=label)
    axes[2].set(title="Are a probe's probabilities right?", ylabel="share that is right")
    axes[2].set(xlabel="the largest probability (a probe on half the labels)")
    axes[2].legend(frameon=False, loc="upper left")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    fn.save_figure(figure, file)


@fn.drawing
def plot_certain_map(points: np.ndarray, found: Certainty, held_out: str, file: Path) -> None:
    """The map of the test images, points (N, 2), coloured by how sure the last way is of them."""
    name, value = list(found.values.items())[-1]
    figure, axis = fn.new_figure(7.6, 6)
    dots = axis.scatter(
        *points.T, c=ranks(value, value).numpy(), s=fn.dot_size(len(points)), lw=0, cmap="viridis"
    )
    axis.set(title=f"t-SNE of the {held_out} images: {name}", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    figure.colorbar(dots, ax=axis, label="rank of its certainty, 1 the surest", shrink=0.6)
    fn.save_figure(figure, file)
