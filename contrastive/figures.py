"""SimCLR's figures and tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

import functions as fn

if TYPE_CHECKING:
    from contrastive.evaluation import Features
    from simCLR import Config


def plot_pretraining(rows: list[dict[str, float]], file: Path) -> None:
    """The loss, and the k-NN accuracy among training images if it was measured, over the epochs of pretraining."""
    checked = [row for row in rows if "knn_accuracy" in row]
    figure, axes = fn.new_figure(10 if checked else 6, 4, columns=2 if checked else 1)
    loss_axis, *knn_axis = axes if checked else [axes]
    marker = "o" if len(rows) <= 10 else ""
    loss_axis.plot([r["epoch"] for r in rows], [r["train_loss"] for r in rows], marker=marker)
    loss_axis.set(title="Pretraining, without labels")
    fn.over_epochs(loss_axis, "NT-Xent loss")
    for axis in knn_axis:
        axis.plot([r["epoch"] for r in checked], [r["knn_accuracy"] for r in checked], color="C1", marker=marker)
        axis.set(title="Its k-NN check, on training images")
        fn.over_epochs(axis, "k-NN accuracy", percent=True)
    fn.save_figure(figure, file)


def show_probe(outcome: dict[str, Any], features: Features, config: Config, folder: Path) -> None:
    """Print the probe's accuracy per class; draw its curves and confusion matrix."""
    probe = outcome["probe"]
    print(f"linear probe: train {100 * probe['train_accuracy']:.1f} %, test {100 * probe['test_accuracy']:.1f} %")
    fn.print_per_class(probe["per_class"])
    if outcome["rows"]:
        fn.plot_curves(
            {"probe": outcome["rows"]}, "test", folder / "probe.png", "Linear probe on the frozen representation"
        )
    fn.plot_confusion_matrix(
        outcome["predicted"], features.test_labels, features.classes, folder / "confusion_matrix.png", "Linear probe"
    )


def tsne_points(h: Tensor, seed: int) -> np.ndarray:
    """t-SNE (van der Maaten & Hinton 2008) of unit vectors, after PCA to 50 dimensions: (N, D), N >= 4 -> (N, 2)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    points = nn.functional.normalize(h, dim=1).numpy()
    points = PCA(min(50, *points.shape), random_state=seed).fit_transform(points)
    return TSNE(perplexity=min(30, (len(points) - 1) / 3), random_state=seed, n_jobs=-1).fit_transform(points)


def show_tsne(features: Features, config: Config, folder: Path) -> None:
    """Draw the t-SNE of the test images' h."""
    if len(features.test) < 4:
        print("no t-SNE: it needs four test images or more")
        return
    print(f"t-SNE of {len(features.test):,} test images", flush=True)
    points = tsne_points(features.test, config.seed)
    fn.plot_tsne(
        points, features.test_labels, features.classes, folder / "tsne.png", "t-SNE of the test images' representations"
    )


def print_table(table: dict[str, dict[str, Any]]) -> None:
    """The outcome at a glance: accuracy on the test images, a row per representation."""
    columns = [name for name in ("knn", "probe") if name in table["pretrained encoder"]]
    print(
        "\ntest accuracy" + " " * 10 + "".join(f"{ {'knn': 'k-NN', 'probe': 'linear'}[name]:>10}" for name in columns)
    )
    for name, row in table.items():
        values = [row[c]["accuracy"] if c == "knn" else row[c]["test_accuracy"] for c in columns]
        print(f"  {name:21}" + "".join(f"{100 * value:8.1f} %" for value in values))
    print()
