"""SimCLR: learn to see from images without labels, then measure what was learned.

T. Chen, S. Kornblith, M. Norouzi, G. Hinton: A Simple Framework for Contrastive Learning of Visual
Representations, ICML 2020 (arXiv 2002.05709). "The paper" below; sections and equations are its own.

    python simCLR.py                                       # CIFAR-10: pretrain, k-NN, linear probe, t-SNE
    python simCLR.py --dataset digits --config configs/digits.yaml        # two minutes on two CPU cores
    python simCLR.py --stages knn,probe --checkpoint runs/.../encoder.pt  # measure an encoder again
    python simCLR.py --resume                              # continue the newest run where it was interrupted

One step of training, with the paper's letters (Section 2.1, Figure 2):

    x  --t ~ T-->  two views  --f(.)-->  representations h  --g(.)-->  embeddings z  -->  NT-Xent loss

Measured (results/digits): with 7 labels per class, k-NN on h reaches 93.9 %, on the untrained encoder's h 80.8 %.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn

import functions as fn
from contrastive.augmentation import (
    color_jitter,
    crop_schedule,
    gaussian_blur,
    random_grayscale,
    random_resized_crop_and_flip,
)
from contrastive.evaluation import LinearClassifier, evaluate  # noqa: F401
from contrastive.figures import plot_pretraining
from contrastive.signals import knn_monitor
from contrastive.small_maps import SmallMapConv2d
from functions import Batches, ImageDataset, RunConfig, UserError, check, nt_xent_loss

STAGES = ("pretrain", "knn", "probe", "tsne")

# ------------------------------------------------------------------------------------------------
# Configuration: every field is a flag
# ------------------------------------------------------------------------------------------------


@dataclass
class Config(RunConfig):
    """SimCLR's settings. Defaults follow the paper's CIFAR-10 experiments (Appendix B.9) unless noted."""

    stages: str = "pretrain,knn,probe,tsne"
    """what to do, comma-separated: pretrain, knn, probe, tsne"""
    checkpoint: str | None = None
    """encoder.pt, or a checkpoint of a run, for stages without pretrain"""
    baselines: bool = True
    """also measure raw pixels and the untrained encoder"""
    label_fraction: float = 1.0
    """share of each class's training labels that k-NN and probe may use"""

    encoder: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    """f(.), the base encoder (the paper: resnet50)"""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """first layers: cifar is 3x3 stride 1 without max-pool, for small images; imagenet is torchvision's own"""
    norm: Literal["batch", "group"] = "batch"
    """BatchNorm as in the paper, or GroupNorm (32 groups), for which no image depends on the others of its batch"""
    hidden_dim: int = 512
    """width of the projection head's hidden layer"""
    embedding_dim: int = 128
    """length of the embedding z"""

    crop_size: int | str | None = None
    """side of the random crops in pixels (the images' own unless given), or a schedule over the share of training:
    16:0.7,24:0.9,32:1 crops to 16 pixels until 70 % of the steps, to 24 until 90 %, then to 32"""
    crop_scale: float = 0.08
    """smallest share of the image's area that a random crop keeps"""
    flip: float = 0.5
    """probability of a horizontal flip"""
    jitter_strength: float = 0.5
    """s, the strength of the colour jitter (the paper: 1 for ImageNet, 0.5 for CIFAR)"""
    jitter: float = 0.8
    """probability of colour jitter"""
    grayscale: float = 0.2
    """probability of dropping colour"""
    blur: float = 0.0
    """probability of Gaussian blur (the paper: 0.5 for ImageNet, none for CIFAR)"""

    epochs: int = 300
    """passes over the images in pretraining"""
    batch_size: int = 512
    """N, images per batch and device: each view sees 2(N - 1) negatives, N counted over all devices"""
    micro_batch_size: int | None = None
    """images that are in memory at once (all of the batch unless given): the same gradient, a third more arithmetic"""
    devices: int = 1
    """GPUs (or processes, on the CPU) of this machine to train on"""
    num_nodes: int = 1
    """machines to train on, each with that many devices"""
    max_time: str | None = None
    """end pretraining after the last epoch that fits into DD:HH:MM:SS (one at least), to go on with --resume"""
    temperature: float = 0.5
    """tau in NT-Xent"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd with momentum 0.9, or adam (the paper: LARS, which matters for batches above 4096)"""
    learning_rate: float | None = None
    """for a batch of 256, unless given 0.06 for sgd and 0.001 for adam; used is learning_rate * N / 256"""
    weight_decay: float = 5e-4
    """of weights; biases and BatchNorm are not decayed (the paper: 1e-6 with LARS)"""
    warmup_epochs: int = 10
    """epochs of linear warm-up before the cosine decay, at most a tenth of all epochs"""
    knn_every: int = 1
    """epochs between k-NN checks, on training images whose labels pretraining never sees"""
    compile: bool = False
    """compile the model with torch.compile: meant for GPUs"""

    knn_k: int = 200
    """neighbours that vote in k-NN"""
    knn_temperature: float = 0.1
    """tau of the votes' weights in k-NN"""
    probe: Literal["sgd", "lbfgs"] = "sgd"
    """how the linear probe is trained: step by step with curves, or to the optimum of logistic regression"""
    probe_epochs: int = 100
    """epochs of the linear probe"""
    probe_batch_size: int = 512
    """images per batch of the linear probe"""
    probe_learning_rate: float = 0.03
    """of the linear probe's SGD, decayed by a cosine; the features are standardised"""

    def validate(self) -> None:
        super().validate()
        counts = ("epochs", "hidden_dim", "embedding_dim", "knn_every", "knn_k", "probe_epochs", "devices", "num_nodes")
        for flag in counts:
            check(getattr(self, flag) >= 1, f"--{flag} must be at least 1, got {getattr(self, flag)}")
        for flag in ("batch_size", "probe_batch_size"):
            check(getattr(self, flag) >= 2, f"--{flag} must be at least 2, got {getattr(self, flag)}")
        for flag in ("flip", "jitter", "grayscale", "blur"):
            check(0 <= getattr(self, flag) <= 1, f"--{flag} is a probability, from 0 to 1, got {getattr(self, flag)}")
        for flag in ("crop_scale", "label_fraction"):
            check(0 < getattr(self, flag) <= 1, f"--{flag} must be above 0 and at most 1, got {getattr(self, flag)}")
        for flag in ("temperature", "knn_temperature", "base_learning_rate", "probe_learning_rate"):
            flag, value = flag.removeprefix("base_"), getattr(self, flag)
            check(0 < value < math.inf, f"--{flag} must be a positive number, got {value}")
        check(0 <= self.weight_decay < math.inf, f"--weight_decay must be 0 or more, got {self.weight_decay}")
        check(self.warmup_epochs >= 0, f"--warmup_epochs must be 0 or more, got {self.warmup_epochs}")
        check(
            0 <= self.jitter_strength <= 1.25, f"--jitter_strength must be from 0 to 1.25, got {self.jitter_strength}"
        )
        crop_schedule(self.crop_size)
        self.validate_devices()
        if "pretrain" not in self.stages_list:
            check(self.checkpoint is not None, f"--stages {self.stages} needs --checkpoint FILE (a run's encoder.pt)")
            check(Path(self.checkpoint or "").is_file(), f"--checkpoint {self.checkpoint}: no such file")
        else:
            check(
                self.checkpoint is None,
                "--checkpoint is for stages after pretrain: leave it out, or pretrain out of --stages",
            )

    def validate_devices(self) -> None:
        """Check what concerns several devices, micro-batches and time. Raises UserError."""
        if self.micro_batch_size is not None:
            wanted = f"--micro_batch_size must be from 2 to --batch_size {self.batch_size}, got {self.micro_batch_size}"
            check(2 <= self.micro_batch_size <= self.batch_size, wanted)
        if self.max_time is not None:
            fn.parse_duration(self.max_time)
        device = fn.resolve_device(self.accelerator)
        here = torch.cuda.device_count() if device == "cuda" else (1 if device == "mps" else os.cpu_count() or 1)
        check(self.devices <= here, f"--devices {self.devices}: this machine has {here} for --accelerator {device}")
        if self.processes > 1:
            self.validate_start(fn.started_together())

    def validate_start(self, started: int | None) -> None:
        """Check that as many processes were `started` by torchrun or SLURM, if by them, as are wanted."""
        wanted = f"--devices {self.devices} on --num_nodes {self.num_nodes} are {self.processes} processes"
        if started is None:
            check(self.num_nodes == 1, f"{wanted}: start them with torchrun or srun, on each node as many as devices")
            return
        how = f"torchrun --nproc_per_node {self.devices}, or srun --ntasks-per-node {self.devices}"
        check(started == self.processes, f"{wanted}, but {started} were started: use {how}")
        named = self.output_dir is not None or self.resume is not None
        check(named, "--output_dir must be given: processes started together have to agree on the run's folder")

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes

    @property
    def effective_batch_size(self) -> int:
        """N over all devices."""
        return self.batch_size * self.processes

    @property
    def base_learning_rate(self) -> float:
        """The learning rate for a batch of 256: what was given, or what suits the optimizer."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.06 if self.optimizer == "sgd" else 0.001

    @property
    def stages_list(self) -> list[str]:
        """The stages in the order they run. Raises UserError for an unknown one."""
        wanted = [stage.strip() for stage in self.stages.split(",")]
        unknown = [stage for stage in wanted if stage not in STAGES]
        check(not unknown, f"--stages: unknown stage {', '.join(map(repr, unknown))}; choose from {','.join(STAGES)}")
        return [stage for stage in STAGES if stage in wanted]


# ------------------------------------------------------------------------------------------------
# Section 3, Appendix A: data augmentation, t ~ T
# ------------------------------------------------------------------------------------------------


def two_views(images: Tensor, config: Config, size: int | None = None) -> Tensor:
    """Two random views of each image: uint8 (N, 3, H, W) -> float32 (2N, 3, size, size) in [0, 1]; i, i + N are a pair.

    size: the views' side in pixels, the images' own unless given.
    """
    with torch.autocast(images.device.type, enabled=False):  # colours keep their float32
        x = images.float().div_(255).repeat(2, 1, 1, 1)
        x = random_resized_crop_and_flip(x, size or x.shape[2], config.crop_scale, config.flip)
        x = color_jitter(x, config.jitter_strength, config.jitter) if config.jitter and config.jitter_strength else x
        x = random_grayscale(x, config.grayscale) if config.grayscale else x
        return gaussian_blur(x, config.blur) if config.blur else x


# ------------------------------------------------------------------------------------------------
# Section 2.1: encoder f(.) and projection head g(.)
# ------------------------------------------------------------------------------------------------


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or fewer where they do not divide the channels: statistics of one image alone."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


NORMS = {"batch": nn.BatchNorm2d, "group": group_norm}


def build_encoder(name: str = "resnet18", stem: str = "cifar", norm: str = "batch") -> tuple[nn.Module, int]:
    """(encoder, feature_dim): a ResNet without its classifier, images (B, 3, H, W) -> h (B, feature_dim).

    The cifar stem replaces the 7x7 stride-2 convolution and max-pool by a 3x3 stride-1 convolution (Appendix B.9).
    norm: batch, or group for GroupNorm (Wu & He 2018, arXiv 1803.08494). Raises UserError for an unknown one of them.
    """
    from torchvision import models

    known = {"resnet18": models.resnet18, "resnet34": models.resnet34, "resnet50": models.resnet50}
    check(name in known, f"--encoder {name} is unknown; choose from {', '.join(known)}")
    check(stem in ("cifar", "imagenet"), f"--stem {stem} is unknown; choose cifar or imagenet")
    check(norm in NORMS, f"--norm {norm} is unknown; choose batch or group")
    encoder: Any = known[name](weights=None, norm_layer=NORMS[norm])
    feature_dim = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
        encoder.maxpool = nn.Identity()
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.__class__ = SmallMapConv2d  # the same parameters under the same names
    return encoder.to(memory_format=torch.channels_last), feature_dim


class SimCLRModel(nn.Module):
    """z = g(f(x)): images (B, 3, H, W) -> embeddings (B, embedding_dim). Evaluation uses h = f(x) (Section 4.2)."""

    def __init__(
        self, encoder: nn.Module, feature_dim: int, hidden_dim: int = 512, embedding_dim: int = 128, norm: str = "batch"
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection_head = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim, bias=False),  # the normalisation has a bias of its own
            nn.BatchNorm1d(hidden_dim) if norm == "batch" else group_norm(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, embedding_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)  # (B, feature_dim)
        return self.projection_head(h)  # (B, embedding_dim)

    def get_encoder(self) -> nn.Module:
        """f(.) alone: images (B, 3, H, W) -> h (B, feature_dim)."""
        return self.encoder


# ------------------------------------------------------------------------------------------------
# Algorithm 1: pretraining
# ------------------------------------------------------------------------------------------------


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 1/warmup_steps to 1, then cosine decay to 0 at total_steps, no restarts (Section 2.3)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


class Pretraining(lightning.LightningModule):
    """Algorithm 1 on unlabelled images, with a k-NN check on labelled training images (`monitor`) when there are any.

    monitor: (bank images, bank labels, query images, query labels, number of classes), all from the training set.
    """

    def __init__(self, model: SimCLRModel, images: Tensor, monitor: tuple[Any, ...] | None, config: Config) -> None:
        super().__init__()
        self.model, self.config, self.monitor = model, config, monitor
        self.batches = Batches(
            images, batch_size=config.batch_size, seed=config.seed, drop_last=True, ranks=config.processes
        )
        self.normalize = fn.Normalize(images)
        self.crop_sizes = crop_schedule(config.crop_size)
        self.features: list[Tensor] = []

    def train_dataloader(self) -> Batches:
        return fn.on_device(self.batches, self.device)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> dict[str, Tensor]:
        (images,) = batch  # uint8 (N, 3, H, W)
        z = self.gather(self.embed(images))  # (2N, embedding_dim), N over all devices
        return {"loss": nt_xent_loss(z, self.config.temperature)}

    def embed(self, images: Tensor) -> Tensor:
        """z of two random views of each image: uint8 (N, 3, H, W) -> (2N, embedding_dim); i, i + N are a pair."""
        done = self.global_step / (self.config.epochs * len(self.batches))
        size = next(side for side, share in self.crop_sizes if done < share)
        views = self.normalize(two_views(images, self.config, size))  # (2N, 3, size, size)
        return self.model(views.contiguous(memory_format=torch.channels_last))

    def gather(self, z: Tensor) -> Tensor:
        """The embeddings of all devices: (2N, D) of each -> (2N * devices, D), where rows i and i + half are a pair.

        Gathered with gradient: every device takes the loss of the whole batch, with negatives from all devices, and
        DDP's mean over the devices is then its gradient.
        """
        everywhere: Any = self.all_gather(z, sync_grads=True)  # (devices, 2N, D)
        return everywhere.view(-1, 2, len(z) // 2, z.shape[1]).transpose(0, 1).reshape(-1, z.shape[1])

    def val_dataloader(self) -> Batches:
        assert self.monitor is not None
        bank, _, queries, _, _ = self.monitor
        return Batches(torch.cat([bank, queries]).to(self.device), batch_size=500)

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        self.features.append(self.model.get_encoder()(self.normalize(batch[0])).float())

    def on_validation_epoch_end(self) -> None:
        assert self.monitor is not None
        bank, labels, _, query_labels, num_classes = self.monitor
        h = torch.cat(self.features)
        self.features.clear()
        k, tau = self.config.knn_k, self.config.knn_temperature
        predicted = fn.knn_predict(h[len(bank) :], h[: len(bank)], labels.to(h.device), num_classes, k, tau)
        self.log("knn_accuracy", fn.accuracy(predicted.cpu(), query_labels), logger=False, sync_dist=True)

    def configure_optimizers(self) -> Any:
        config = self.config
        rate = actual_learning_rate(config)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]  # biases and BatchNorm
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, fused=True)
        else:
            optimizer = torch.optim.Adam(groups, lr=rate, fused=True)
        warmup, total = warmup_epochs(config) * len(self.batches), config.epochs * len(self.batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, round(warmup), total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class CachedPretraining(Pretraining):
    """The same with a batch of any size in the memory of a micro-batch: gradient caching (Gao et al. 2021, 2101.06983).

    Losses of parts of the batch would lack negatives. So the whole batch is embedded, micro-batch by micro-batch and
    without keeping what backward needs; the loss of all embeddings gives its gradient with respect to each of them; and
    each micro-batch is embedded once more, to carry that gradient on to the weights.
    """

    def embed(self, images: Tensor) -> Tensor:
        self.micro_batches = images.split(self.config.micro_batch_size or len(images))
        with torch.no_grad(), frozen_statistics(self.model):
            pairs = [self.embed_again(i).view(2, -1, self.config.embedding_dim) for i in range(len(self.micro_batches))]
        self.z = torch.cat(pairs, dim=1).flatten(0, 1).requires_grad_()  # a leaf: the graph of the loss ends here
        return self.z

    def embed_again(self, i: int) -> Tensor:
        """z of micro-batch i, of the same views each time: they are drawn anew from their seed, not stored."""
        torch.manual_seed(fn.mix_seed(self.config.seed, self.global_step, self.global_rank, i))
        return super().embed(self.micro_batches[i])

    def backward(self, loss: Tensor) -> None:
        """From the loss to the gradient of the weights; Lightning calls it between training_step and the optimizer."""
        loss.backward()
        assert self.z.grad is not None
        pairs = self.z.grad.view(2, -1, self.config.embedding_dim)
        *others, last = [pair.flatten(0, 1) for pair in pairs.split(len(self.micro_batches[0]), dim=1)]
        autocast, parameters = self.trainer.precision_plugin.forward_context, list(self.model.parameters())
        for i, gradient in enumerate(others):
            with autocast():
                z = self.embed_again(i)
            for p, g in zip(parameters, torch.autograd.grad(z, parameters, gradient), strict=True):
                p.grad = (torch.zeros_like(p) if p.grad is None else p.grad).add_(g)  # in the memory layout of p
        with autocast():
            z = self.embed_again(len(others))
        z.backward(last)  # the one that DDP sees: here it averages over the devices what each has added up


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by its batch but leaves its running statistics alone: a second pass will update them."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def actual_learning_rate(config: Config) -> float:
    """The paper's linear scaling rule (Section 2.3): learning_rate * N / 256, N the batch over all devices."""
    return config.base_learning_rate * config.effective_batch_size / 256


def warmup_epochs(config: Config) -> float:
    """The epochs of warm-up: as configured, but at most a tenth of a short training."""
    return min(config.warmup_epochs, config.epochs / 10)


def describe_batch(config: Config) -> str:
    """N, and how it comes about, for people."""
    words = str(config.effective_batch_size)
    if config.effective_batch_size != config.batch_size:
        nodes = f" x {config.num_nodes} nodes" if config.num_nodes > 1 else ""
        words += f" = {config.batch_size} x {config.devices} devices{nodes}"
    return words + (f", in micro-batches of {config.micro_batch_size}" if config.micro_batch_size else "")


def pretrain(model: SimCLRModel, data: ImageDataset, config: Config, folder: Path) -> dict[str, Any]:
    """Train `model` in place on the set's images without labels; returns the `pretrain` part of results."""
    images = data.pretraining_images
    kind = Pretraining if config.micro_batch_size is None else CachedPretraining
    module = kind(model, images, knn_monitor(data, config.seed), config)
    if config.compile:
        model.compile(dynamic=False)  # a graph per crop size
    log = fn.EpochLog(folder / "metrics.csv")
    checkpoint = fn.Checkpoints(folder / "checkpoints", log)
    validation: dict[str, Any] = (
        {"check_val_every_n_epoch": config.knn_every} if module.monitor else {"limit_val_batches": 0}
    )
    trainer = fn.make_trainer(
        config,
        config.epochs,
        folder=folder,
        log=log,
        checkpoint=checkpoint,
        max_time=config.max_time,
        devices=config.devices,
        num_nodes=config.num_nodes,
        **validation,
    )
    steps, rate, n = len(module.batches), actual_learning_rate(config), config.effective_batch_size
    if config.crop_size is not None:
        print("crops of " + ", ".join(f"{side} pixels until {share:.0%}" for side, share in module.crop_sizes))
    print(
        f"pretraining on {len(images):,} images without labels: batch {describe_batch(config)} "
        f"({2 * (n - 1):,} negatives per view), {steps} steps an epoch\n"
        f"{config.optimizer}, learning rate {config.base_learning_rate:g} x {n}/256 = {rate:g}, "
        f"warm-up {warmup_epochs(config):g} of {config.epochs} epochs, then cosine",
        flush=True,
    )
    fn.fit(trainer, module, folder / "checkpoints" / "last.ckpt")
    fn.save_torch(folder / "encoder.pt", {k: v.cpu() for k, v in model.get_encoder().state_dict().items()})
    seconds = sum(row["seconds"] for row in log.rows)
    plot_pretraining(log.rows, folder / "pretraining.png")
    return {
        "epochs": len(log.rows),
        "steps": len(log.rows) * steps,
        "seconds": round(seconds, 1),
        "pairs_per_second": round(float(torch.tensor([r["images_per_second"] for r in log.rows]).median()), 1),
        "final_loss": log.rows[-1]["train_loss"],
        "normalize": {"mean": module.normalize.mean.flatten().tolist(), "std": module.normalize.std.flatten().tolist()},
    }


def load_encoder(encoder: nn.Module, file: Path) -> None:
    """Load weights from an encoder.pt or a checkpoint of this script. Data only, never code. Raises UserError."""
    check(file.is_file(), f"--checkpoint {file}: no such file")
    prefix = "model.encoder."
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if "state_dict" in state:
            state = {k.removeprefix(prefix): v for k, v in state["state_dict"].items() if k.startswith(prefix)}
        found = {name: value.shape for name, value in state.items()}
    except Exception:  # a damaged file can fail in many ways
        raise UserError(f"--checkpoint {file} is damaged, or no checkpoint at all: take another file") from None
    expected = {name: value.shape for name, value in encoder.state_dict().items()}
    other = f"--checkpoint {file} is of another encoder: give the --encoder, --stem and --norm it was trained with"
    check(found == expected, other)
    encoder.load_state_dict(state)


# ------------------------------------------------------------------------------------------------
# Figures and tables
# ------------------------------------------------------------------------------------------------


def plot_views(data: ImageDataset, config: Config, file: Path, count: int = 10) -> None:
    """A figure of `count` training images (top row) and two random views of each."""
    from torchvision.utils import make_grid

    torch.manual_seed(config.seed)
    images = data.train_images[torch.randperm(len(data.train_images))[:count]]
    views = two_views(images, config)
    side, gap = images.shape[-1], max(1, images.shape[-1] // 16)
    grid = make_grid(torch.cat([images / 255, views]), nrow=len(images), padding=gap, pad_value=1)  # a row each
    figure, axis = fn.new_figure(10, 3.4)
    axis.imshow(grid.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axis.set(title="What the encoder must recognise as the same image", xticks=[])
    axis.set_yticks([(r + 0.5) * (side + gap) for r in range(3)], ["image", "view 1", "view 2"])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    fn.save_figure(figure, file)


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    if fn.finished(config):
        return
    record = fn.start_record(config)
    data = fn.load_dataset(config.dataset, config.data_dir, config.image_size)
    stages = config.stages_list
    if stages != ["pretrain"]:
        data.labelled()  # fails now rather than after hours of pretraining
    n = len(data.pretraining_images)
    check(n >= 2, f"--dataset {data.name}: {n} image is too few to learn from")
    most = n // config.processes
    too_many = f"--batch_size {config.batch_size} is too large for the {n:,} images of {data.name}: take at most {most}"
    check(config.batch_size <= most or "pretrain" not in stages, too_many)

    torch.manual_seed(config.seed)
    encoder, feature_dim = build_encoder(config.encoder, config.stem, config.norm)
    model = SimCLRModel(encoder, feature_dim, config.hidden_dim, config.embedding_dim, config.norm)
    torch.manual_seed(config.seed)
    # The same weights, which pretraining will not touch.
    untrained, _ = build_encoder(config.encoder, config.stem, config.norm)
    if config.checkpoint is not None:
        load_encoder(encoder, Path(config.checkpoint))

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"SimCLR on {data.name}: {n:,} images of {data.train_images.shape[-1]} pixels for pretraining")
    print(f"{config.encoder}, {config.stem} stem, {parameters:.1f} M parameters; {fn.describe_machine(config)}")
    with fn.run_folder(config) as folder:
        results: dict[str, Any] = {}
        if "pretrain" in stages:
            if fn.is_first_process(config):
                plot_views(data, config, folder / "views.png")
            results["pretrain"] = pretrain(model, data, config, folder)
        if stages != ["pretrain"]:
            results |= evaluate(encoder, untrained, data, config, folder)
        fn.save_results(folder, record, **results)


if __name__ == "__main__":
    fn.command_line(main, Config, __doc__)
