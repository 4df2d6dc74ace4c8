"""Section 4 and Appendix B of the SimCLR paper: what did it learn? k-NN and linear probe on the frozen h."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import functions as fn
from contrastive.figures import print_table, show_probe, show_tsne
from functions import Batches, ImageDataset

if TYPE_CHECKING:
    from simCLR import Config


class LinearClassifier(nn.Module):
    """images (B, 3, H, W) -> logits (B, num_classes) through a frozen encoder: no gradient, BatchNorm in eval mode.

    `classifier` is what the probe trains.
    """

    def __init__(self, encoder: nn.Module, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.classifier = nn.Linear(feature_dim, num_classes)
        self.train(self.training)

    def train(self, mode: bool = True) -> LinearClassifier:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.encoder(x)
        return self.classifier(h)


class Probe(fn.Classification):
    """A linear classifier on features (B, D), trained by SGD with momentum and a cosine schedule."""

    def __init__(self, model: nn.Linear, train: Batches, test: Batches, learning_rate: float, epochs: int) -> None:
        super().__init__(model, train, test, held_out="test")
        self.learning_rate, self.epochs = learning_rate, epochs

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * len(self.train_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class Features:
    """What one encoder makes of the labelled images: h float32 (N, D) and labels int64 (N,) of both splits."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


def train_probe(classifier: nn.Linear, features: Features, config: Config) -> list[dict[str, float]]:
    """Train `classifier` in place on features.train; returns the rows of its training curves (none for lbfgs).

    The features are standardised for training and the scaling is then folded into the classifier's weights: still a
    linear classifier of h, reached without tuning a learning rate to each encoder. The test curve chooses nothing.
    """
    std, mean = torch.std_mean(features.train, dim=0)
    std = torch.where(std > 1e-6, std, torch.inf)  # a constant feature gets the weight 0
    train, test = (features.train - mean) / std, (features.test - mean) / std
    rows: list[dict[str, float]] = []
    if config.probe == "lbfgs":
        from sklearn.linear_model import LogisticRegression

        optimum = LogisticRegression(max_iter=1000).fit(train.numpy(), features.train_labels.numpy())
        weight, bias = torch.from_numpy(optimum.coef_), torch.from_numpy(optimum.intercept_)
        if len(features.classes) == 2:  # scikit-learn then keeps one row: the logit of the second class
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    else:
        torch.manual_seed(config.seed)
        model = nn.Linear(train.shape[1], len(features.classes))
        batch_size = min(config.probe_batch_size, len(train))
        batches = Batches(train, features.train_labels, batch_size=batch_size, seed=config.seed)
        held_out = Batches(test, features.test_labels, batch_size=5000)
        log = fn.EpochLog(quiet=True, rate="--probe_learning_rate")
        trainer = fn.make_trainer(config, config.probe_epochs, log=log)
        fn.fit(trainer, Probe(model, batches, held_out, config.probe_learning_rate, config.probe_epochs))
        weight, bias, rows = model.weight.detach().cpu(), model.bias.detach().cpu(), log.rows
    with torch.no_grad():
        classifier.weight.copy_(weight / std)
        classifier.bias.copy_(bias - (weight / std) @ mean.to(weight.dtype))
    return rows


def measure(features: Features, config: Config, probe: nn.Linear | None = None) -> dict[str, Any]:
    """k-NN and linear-probe accuracy on the test images of one set of features, as the stages ask."""
    outcome: dict[str, Any] = {}
    if "knn" in config.stages_list:
        predicted = fn.knn_predict(
            features.test,
            features.train,
            features.train_labels,
            len(features.classes),
            config.knn_k,
            config.knn_temperature,
        )
        outcome["knn"] = {"accuracy": fn.accuracy(predicted, features.test_labels)}
    if "probe" in config.stages_list:
        classifier = probe or nn.Linear(features.train.shape[1], len(features.classes))
        outcome["rows"] = train_probe(classifier, features, config)
        with torch.no_grad():
            predicted_train = classifier(features.train).argmax(1)
            predicted = outcome["predicted"] = classifier(features.test).argmax(1)
        outcome["probe"] = {
            "train_accuracy": fn.accuracy(predicted_train, features.train_labels),
            "test_accuracy": fn.accuracy(predicted, features.test_labels),
            "per_class": fn.accuracy_per_class(predicted, features.test_labels, features.classes),
        }
    return outcome


def evaluate(
    encoder: nn.Module, untrained: nn.Module, data: ImageDataset, config: Config, folder: Path
) -> dict[str, Any]:
    """The stages after pretraining. Features are computed once per encoder and shared by every evaluation."""
    train_images, train_labels, test_images, test_labels = data.labelled()
    chosen = fn.stratified_subset(train_labels, config.label_fraction, config.seed)
    train_images, train_labels = train_images[chosen], train_labels[chosen]
    normalize = fn.Normalize(data.pretraining_images)

    def features(f: nn.Module) -> Features:
        model = nn.Sequential(normalize, f)
        train, test = (fn.extract_features(model, images, config) for images in (train_images, test_images))
        return Features(train, train_labels, test, test_labels, data.classes)

    results: dict[str, Any] = {}
    table: dict[str, dict[str, Any]] = {}
    if config.baselines and {"knn", "probe"} & set(config.stages_list):
        print("measuring raw pixels and the untrained encoder", flush=True)
        table["raw pixels"] = measure(features(nn.Flatten()), config)
        table["untrained encoder"] = measure(features(untrained), config)
        results["baselines"] = {
            name.replace(" ", "_"): {k: v for k, v in row.items() if k in ("knn", "probe")}
            for name, row in table.items()
        }
    print(
        f"measuring the pretrained encoder on {len(train_labels):,} labelled and {len(test_labels):,} test images",
        flush=True,
    )
    h = features(encoder)
    classifier = LinearClassifier(encoder.cpu(), h.train.shape[1], len(data.classes))
    ours = table["pretrained encoder"] = measure(h, config, classifier.classifier)
    results |= {name: ours[name] for name in ("knn", "probe") if name in ours}
    if "probe" in ours:
        fn.save_torch(folder / "classifier.pt", classifier.state_dict())
        show_probe(ours, h, config, folder)
    if "tsne" in config.stages_list:
        show_tsne(h, config, folder)
    if {"knn", "probe"} & set(config.stages_list):
        print_table(table)
    return results
