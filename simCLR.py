"""SimCLR: learn to see from images without labels, then measure what was learned.

T. Chen, S. Kornblith, M. Norouzi, G. Hinton: A Simple Framework for Contrastive Learning of Visual
Representations, ICML 2020 (arXiv 2002.05709): "the paper" below, with its sections and equations.

    python simCLR.py                                           # CIFAR-10: pretrain, then measure
    python simCLR.py --config configs/digits.yaml              # a few minutes on two CPU cores
    python simCLR.py --stages knn,probe --checkpoint runs/...  # measure a run's encoder again
    python simCLR.py --resume                                  # continue the newest run

One step of training, with the paper's letters (Section 2.1, Figure 2):

    x  --t ~ T-->  two views  --f(.)-->  representations h  --g(.)-->  embeddings z  -->  NT-Xent

Measured (results/digits): with one label per class, a linear probe on h reaches 76.2 ± 4.8 %, on
raw pixels 53.7 ± 6.2 %.

What can be set stands beside what it sets: Views, Encoder, Head, Optimisation, and in contrastive/
Loss (losses.py) and EvaluationSettings (evaluation.py). Config, at the end, is all of them.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import functions as fn
from contrastive import figures
from contrastive.arithmetic import arithmetic, in_words
from contrastive.augmentation import (
    color_jitter,
    crop_schedule,
    gaussian_blur,
    random_grayscale,
    random_resized_crop_and_flip,
)
from contrastive.caching import GradientCache
from contrastive.certainty import Asked
from contrastive.encoders import (
    ACTIVATIONS,
    NORMS,
    CompactNet,
    EncoderName,
    head_norm,
    layout,
    widen,
)
from contrastive.evaluation import EvaluationSettings, draw, evaluate
from contrastive.features import save_features
from contrastive.lars import LARS
from contrastive.losses import Loss, certain_loss, check_loss, contrastive_loss
from contrastive.muon import Muon
from contrastive.plan import check_data, print_model, print_plan
from contrastive.pretrained import as_trained, check_encoder, encoder_file, load_trained
from contrastive.probe import LinearClassifier  # noqa: F401
from contrastive.representation import Resized, in_cells, on_crops, recalibrate, up_to_layer
from contrastive.sets import Sets, as_shown, at_learned_size, load_sets
from contrastive.signals import KnnMonitor, Monitored, knn_monitor
from contrastive.small_maps import use_small_maps
from contrastive.whitening import whiten
from functions import Batches, ImageDataset, check

# ------------------------------------------------------------------------------------------------
# Section 3, Appendix A: data augmentation, t ~ T
# ------------------------------------------------------------------------------------------------


@dataclass
class Views(fn.Settings):
    """T, the family of augmentations: what is drawn anew for every view."""

    title: ClassVar[str] = "views"

    views: int = 2
    """M, views of each image in a batch (the paper: 2); with more, fewer images are seen for the
    same arithmetic"""
    crop_size: int | str | None = None
    """side of the random crops in pixels (the images' own unless given), or a schedule over the
    share of training: 16:0.7,24:0.9,32:1 crops to 16 pixels until 70 % of the steps, to 24 until
    90 %, then to 32"""
    crop_scale: float = 0.08
    """smallest share of the image's area that a random crop keeps"""
    crop_scale_max: float = 1.0
    """largest share; as large as --crop_scale, it gives patches of a fixed area"""
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

    def validate(self) -> None:
        super().validate()
        self.require("views", fn.at_least(2))
        self.require("flip jitter grayscale blur", fn.PROBABILITY)
        self.require("crop_scale crop_scale_max", fn.SHARE)
        least, most = self.crop_scale, self.crop_scale_max
        check(least <= most, f"--crop_scale {least} must be at most --crop_scale_max {most}")
        strength = self.jitter_strength
        check(0 <= strength <= 1.25, f"--jitter_strength must be from 0 to 1.25, got {strength}")
        crop_schedule(self.crop_size)


def random_views(images: Tensor, t: Views, size: int | None = None, count: int = 2) -> Tensor:
    """Two random views of each image, or `count`, t ~ T: rows i, i + N ... are of image i.

    uint8 (N, 3, H, W) -> float32 (count N, 3, size, size) in [0, 1]; size is the images' own
    unless given.
    """
    with torch.autocast(images.device.type, enabled=False):  # colours keep their float32
        x = images.float().div_(255).repeat(count, 1, 1, 1)
        scale = t.crop_scale, t.crop_scale_max
        x = random_resized_crop_and_flip(x, size or x.shape[2], *scale, t.flip)
        if t.jitter and t.jitter_strength:
            x = color_jitter(x, t.jitter_strength, t.jitter)
        if t.grayscale:
            x = random_grayscale(x, t.grayscale)
        return gaussian_blur(x, t.blur) if t.blur else x


# ------------------------------------------------------------------------------------------------
# Section 2.1: encoder f(.) and projection head g(.)
# ------------------------------------------------------------------------------------------------


@dataclass
class Encoder(fn.Settings):
    """f(.), which is kept."""

    title: ClassVar[str] = "encoder"

    encoder: EncoderName = "resnet18"
    """f(.), the base encoder (the paper: resnet50); compact is a network of seven convolutions for
    small images, which learns more from the same arithmetic"""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """first layers of a ResNet: cifar is 3x3 stride 1 without max-pool, for small images; imagenet
    is torchvision's own"""
    norm: Literal["batch", "group"] = "batch"
    """BatchNorm as in the paper, or GroupNorm (32 groups), for which no image depends on the
    others of its batch"""
    activation: Literal["relu", "gelu", "silu", "leaky_relu"] = "relu"
    """the encoder's nonlinearity (the paper and torchvision: relu)"""
    zero_init: bool = False
    """let each block of a ResNet begin as the identity, as in the paper's own code: its last
    normalisation scales by 0"""
    width: float = 1.0
    """multiplies the channels of every layer, to multiples of eight (the paper's Figure 7: 2 and
    4); arithmetic grows with about its square"""
    feature_dim: int | None = None
    """length of h: a 1x1 convolution widens the last map to it before the average (unless given,
    as wide as the encoder ends: the paper)"""
    whiten: bool = False
    """start the first layer from the whitened principal components of the images' patches"""

    def validate(self) -> None:
        super().validate()
        check_encoder(self.encoder, self.stem, self.zero_init)
        self.require("feature_dim", fn.at_least(1))
        check(1 / 8 <= self.width <= 8, f"--width must be from 0.125 to 8, got {self.width:g}")


@dataclass
class Head(fn.Settings):
    """g(.), which pretraining alone needs."""

    title: ClassVar[str] = "projection head"

    head_layers: int = 2
    """linear layers of g(.): 2 as in the paper, 1 is a linear head, 0 compares h itself"""
    hidden_dim: int = 512
    """width of the projection head's hidden layers"""
    embedding_dim: int = 128
    """length of the embedding z"""
    head_norm: Literal["batch", "group", "none"] | None = None
    """normalisation of the head's hidden layers (as --norm unless given)"""
    head_dropout: float = 0.0
    """share of the head's hidden units dropped in each step"""

    def validate(self) -> None:
        super().validate()
        self.require("hidden_dim embedding_dim", fn.at_least(1))
        self.require("head_layers", fn.NOT_NEGATIVE)
        self.require("head_dropout", fn.BELOW_1)


def build_encoder(
    name: str = "resnet18",
    stem: str = "cifar",
    norm: str = "batch",
    activation: str = "relu",
    zero_init: bool = False,
    width: float = 1,
    feature_dim: int | None = None,
) -> tuple[nn.Module, int]:
    """(encoder, feature_dim): a ResNet without its classifier, or a `CompactNet`.

    Images (B, 3, H, W) -> h (B, feature_dim). The cifar stem replaces the 7x7 stride-2 convolution
    and the max-pool by a 3x3 stride-1 convolution (Appendix B.9). norm: batch, or group for
    GroupNorm (Wu & He 2018, arXiv 1803.08494). activation: what stands where ResNets have ReLU; the
    parameters are the same. zero_init: residual blocks begin as the identity (Goyal et al. 2017,
    arXiv 1706.02677, Section 5.1). width: a factor on all channels; bigger models benefit
    more (Section 4.1, Figure 7). feature_dim: another length of h (`widen`). Raises UserError for
    an unknown name.
    """
    check_encoder(name, stem, zero_init)
    check(norm in NORMS, f"--norm {norm} is unknown; choose batch or group")
    kinds = ", ".join(ACTIVATIONS)
    check(activation in ACTIVATIONS, f"--activation {activation} is unknown; choose from {kinds}")

    if name == "compact":
        compact = CompactNet(NORMS[norm], ACTIVATIONS[activation], width)
        encoder: nn.Module = compact
        dim = compact.feature_dim
    else:
        from contrastive.resnets import build_resnet

        encoder, dim = build_resnet(name, stem, norm, activation, zero_init, width)
    if feature_dim is not None:
        widen(encoder, dim, feature_dim, NORMS[norm], ACTIVATIONS[activation])
    use_small_maps(encoder)
    return encoder.to(memory_format=layout("cpu")), feature_dim or dim


def build_head(
    feature_dim: int,
    hidden_dim: int = 512,
    embedding_dim: int = 128,
    norm: str = "batch",
    layers: int = 2,
    dropout: float = 0.0,
) -> nn.Sequential:
    """g(.): h (B, feature_dim) -> z (B, embedding_dim), of so many linear layers.

    Two are the paper's nonlinear head, one is its linear head, none leaves h as it is (Section
    4.2, Figure 8). norm: batch, group or none.
    """
    if layers == 0:
        return nn.Sequential()
    hidden: list[nn.Module] = []
    width = feature_dim
    for _ in range(layers - 1):
        # A normalisation has a bias of its own.
        hidden += [nn.Linear(width, hidden_dim, bias=norm == "none"), *head_norm(norm, hidden_dim)]
        hidden += [nn.ReLU(inplace=True), *([nn.Dropout(dropout)] if dropout else [])]
        width = hidden_dim
    return nn.Sequential(*hidden, nn.Linear(width, embedding_dim))


class SimCLRModel(nn.Module):
    """z = g(f(x)): images (B, 3, H, W) -> embeddings (B, embedding_dim).

    Evaluation uses h = f(x) (Section 4.2). What follows `feature_dim` is `build_head`'s.
    """

    def __init__(self, encoder: nn.Module, feature_dim: int, *head: Any, **named: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection_head = build_head(feature_dim, *head, **named)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)  # (B, feature_dim)
        return self.projection_head(h)  # (B, embedding_dim)

    def get_encoder(self) -> nn.Module:
        """f(.) alone: images (B, 3, H, W) -> h (B, feature_dim)."""
        return self.encoder


# ------------------------------------------------------------------------------------------------
# Sections 2.2 and 2.3: large batches, and a learning rate that follows them
# ------------------------------------------------------------------------------------------------


@dataclass
class Optimisation(fn.SeveralDevices):
    """How the loss is minimised, and on which devices."""

    title: ClassVar[str] = "pretraining"

    epochs: int = 300
    """passes over the images in pretraining"""
    batch_size: int = 512
    """N, images per batch and device: each view sees M(N - 1) negatives, N counted over all
    devices (2(N - 1) with --positives mean, N - 1 with --loss latent_class)"""
    micro_batch_size: int | None = None
    """images that are in memory at once (all of the batch unless given): a third more arithmetic,
    and the same gradient, but that BatchNorm sees no more than these"""
    optimizer: Literal["sgd", "adam", "adamw", "lars", "muon"] = "sgd"
    """the paper: lars, which matters for large batches; muon steps alike in all directions"""
    momentum: float = 0.9
    """of sgd, lars and muon"""
    nesterov: bool = False
    """sgd, lars and muon look one step of their momentum ahead"""
    learning_rate: float | None = None
    """for a batch of 256, unless given 0.06 for sgd, 0.3 for lars, 0.03 for muon (nearly the share
    by which a layer turns in a step), 0.001 for adam and adamw"""
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """how the learning rate follows the batch: N / 256 as in the paper, the square root of that, or
    not at all; the square root of Appendix B.1 is sqrt, with lars, at a --learning_rate of 1.2"""
    weight_decay: float = 5e-4
    """of weights; biases and BatchNorm are not decayed (the paper: 1e-6 with LARS), nor is anything
    with muon, which keeps a weight's length"""
    ema: float | None = None
    """the encoder is a moving average of the trained one, with this decay: 0.99 keeps about the
    last 100 steps"""
    warmup_epochs: int = 10
    """epochs of linear warm-up before the cosine decay, at most a tenth of all epochs"""
    compile: bool = False
    """compile the model with torch.compile: meant for GPUs"""

    def validate(self) -> None:
        super().validate()
        self.require("epochs", fn.at_least(1))
        self.require("batch_size", fn.at_least(2))
        self.require("learning_rate", fn.POSITIVE)
        self.require("weight_decay warmup_epochs", fn.NOT_NEGATIVE)
        self.require("momentum", fn.BELOW_1)
        self.require("ema", fn.PART)
        possible = self.momentum > 0 and self.optimizer in ("sgd", "lars", "muon")
        remedy = "take sgd, lars or muon, with momentum, or leave it out"
        check(possible or not self.nesterov, f"--nesterov is about momentum: {remedy}")
        micro, batch = self.micro_batch_size, self.batch_size
        fits = micro is None or 2 <= micro <= batch
        check(fits, f"--micro_batch_size must be from 2 to --batch_size {batch}, got {micro}")
        turn = actual_learning_rate(self)
        problem = f"--learning_rate: with muon, a layer would turn by {turn:g} of its length a step"
        check(self.optimizer != "muon" or turn < 1, f"{problem}: give less, or --scaling none")
        lacking = self.compile and torch.cuda.is_available() and find_spec("triton") is None
        remedy = "install triton (on Windows triton-windows), or leave it out"
        check(not lacking, f"--compile needs Triton on a CUDA GPU: {remedy}")

    @property
    def effective_batch_size(self) -> int:
        """N over all devices."""
        return self.batch_size * self.processes

    @property
    def base_learning_rate(self) -> float:
        """The learning rate for a batch of 256: what was given, or what suits the optimizer."""
        if self.learning_rate is not None:
            return self.learning_rate
        return {"sgd": 0.06, "lars": 0.3, "muon": 0.03}.get(self.optimizer, 0.001)


SCALINGS = {"linear": lambda ratio: ratio, "sqrt": math.sqrt, "none": lambda _: 1.0}


def actual_learning_rate(config: Optimisation) -> float:
    """The paper's linear scaling rule: learning_rate * N / 256, N the batch over all devices.

    Or with the square root of N / 256, or without it. The paper's other rule, 0.075 sqrt(N), is
    better for small batches and few epochs (Appendix B.1); at a learning_rate of 1.2 it is this.
    """
    return config.base_learning_rate * SCALINGS[config.scaling](config.effective_batch_size / 256)


def make_optimizer(parameters: Sequence[nn.Parameter], config: Config) -> Any:
    """What --optimizer names. Weights decay (not Muon's); biases and normalisation do not."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate = actual_learning_rate(config)
    if config.optimizer in ("adam", "adamw"):
        adam = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return adam(groups, lr=rate, fused=True)
    options: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    if config.optimizer == "lars":
        return LARS(groups, lr=rate, **options)
    if config.optimizer == "muon":
        dtype = fn.REDUCED.get(config.machine.precision, torch.float32)
        return Muon(groups, lr=rate, dtype=dtype, **options)
    return torch.optim.SGD(groups, lr=rate, fused=True, **options)


def warmup_epochs(config: Optimisation) -> float:
    """The epochs of warm-up: as configured, but at most a tenth of a short training."""
    return min(config.warmup_epochs, config.epochs / 10)


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 1/warmup_steps to 1, then a cosine to 0 at total_steps, no restarts."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_steps = max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))


# ------------------------------------------------------------------------------------------------
# All settings
# ------------------------------------------------------------------------------------------------


@dataclass
class Config(EvaluationSettings, Optimisation, Loss, Views, Head, Encoder, fn.RunConfig):
    """SimCLR's settings: the paper's method; where it has other numbers, --help says which.

    RunConfig stands last so that a config.yaml begins with the data set.
    """

    script: ClassVar[str] = "simCLR.py"
    if_memory_runs_out: ClassVar[str] = (
        "give --micro_batch_size (nearly the same result), or take a smaller --batch_size, "
        "--crop_size or --encoder"
    )

    def validate(self) -> None:
        super().validate()
        fits = self.norm == "batch" or not self.recalibrate
        check(fits, "--recalibrate is about BatchNorm's statistics: leave it out with --norm group")
        check_loss(self)
        alone = self.processes == 1 or "pretrain" in self.stages_list
        check(alone, "--devices is for pretraining: leave it out, or add pretrain to --stages")


# ------------------------------------------------------------------------------------------------
# Algorithm 1: pretraining
# ------------------------------------------------------------------------------------------------


class Pretraining(Monitored):
    """Algorithm 1 on unlabelled images, uint8 (N, 3, H, W), with a k-NN check by the monitor."""

    def __init__(
        self, model: SimCLRModel, images: Tensor, monitor: KnnMonitor | None, config: Config
    ) -> None:
        super().__init__(monitor, config.knn_k, config.knn_temperature)
        self.model = model
        self.config = config
        self.normalize = fn.Normalize(images)
        self.resize = Resized(config.evaluation_size)
        self.crop_sizes = crop_schedule(config.crop_size)
        self.batches = Batches(
            images,
            batch_size=config.batch_size,
            seed=config.seed,
            drop_last=True,
            ranks=config.processes,
        )

    def train_dataloader(self) -> Batches:
        return self.batches.to(self.device)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> dict[str, Tensor]:
        (images,) = batch  # uint8 (N, 3, H, W)
        c = self.config
        z = self.embed(images)  # (M N, embedding_dim), with the paper's two views (2 N, ...)
        z = self.gather(z)  # the same, N over all devices
        if batch_idx + 1 == len(self.batches):
            self.watch(z[:, : z.shape[1] - c.beside_embedding], c.views)
        if c.loss != "nt_xent":
            return {"loss": certain_loss(z, c.loss, c.temperature)}
        return {"loss": contrastive_loss(z, c.views, c.temperature, c.positives, c.decoupled)}

    def embed(self, images: Tensor) -> Tensor:
        """z of random views of each image: uint8 (N, 3, H, W) -> (M N, embedding_dim)."""
        size = self.side_at(self.global_step / (self.config.epochs * len(self.batches)))
        views = random_views(images, self.config, size, self.config.views)
        views = self.normalize(views).contiguous(memory_format=layout(self.device.type))
        return self.model(views)

    def side_at(self, done: float) -> int | None:
        """The side of the crops when so large a share of the training is done; None: no other."""
        last, _ = self.crop_sizes[-1]
        return next((side for side, share in self.crop_sizes if done < share), last)

    def gather(self, z: Tensor) -> Tensor:
        """The embeddings of all devices: (M N, D) of each -> (devices * M N, D), view by view.

        Gathered with gradient: every device takes the loss of the whole batch, with negatives from
        all devices, and DDP's mean over the devices is then its gradient.
        """
        m, d = self.config.views, z.shape[1]
        everywhere: Any = self.all_gather(z, sync_grads=True)  # (devices, M N, D)
        by_view = everywhere.view(-1, m, len(z) // m, d).transpose(0, 1)  # (M, devices, N, D)
        return by_view.reshape(-1, d)  # all first views, then all second views

    def represent(self, images: Tensor) -> Tensor:
        return self.model.get_encoder()(self.normalize(self.resize(images)))

    def configure_optimizers(self) -> Any:
        config = self.config
        optimizer = make_optimizer(list(self.model.parameters()), config)
        warmup = round(warmup_epochs(config) * len(self.batches))
        total = config.epochs * len(self.batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, warmup, total)
        )
        return fn.every_step(optimizer, schedule)


class CachedPretraining(GradientCache, Pretraining):
    """The same, with a batch of any size in the memory of a micro-batch."""


@dataclass
class Pretrained:
    """What pretraining leaves: its part of results.json, and the rows of its epochs."""

    results: dict[str, Any]
    rows: list[dict[str, float]]


def pretrain(model: SimCLRModel, data: ImageDataset, config: Config, folder: Path) -> Pretrained:
    """Train `model` in place on the set's images without labels; leaves encoder.pt in `folder`."""
    kind = Pretraining if config.micro_batch_size is None else CachedPretraining
    monitor = knn_monitor(data, config.seed)
    module = kind(model, data.pretraining_images, monitor, config)
    if config.whiten:
        whiten(model.get_encoder().conv1, module.normalize, data.pretraining_images)
    if config.compile:
        # A graph for each crop size and micro-batch, with and without a gradient.
        torch._dynamo.config.recompile_limit = 64
        model.compile(dynamic=False)

    log = fn.EpochLog(folder / "metrics.csv", names={"knn": "k-NN"})
    validation: dict[str, Any] = {"check_val_every_n_epoch": config.knn_every}
    if monitor is None:
        validation = {"limit_val_batches": 0}
    decay, device = config.ema, config.machine.device
    trainer = fn.make_trainer(
        config.machine,
        config.seed,
        config.epochs,
        log,
        [] if decay is None else [fn.AveragedWeights(decay, device)],
        folder=folder,
        checkpoint=fn.Checkpoints(folder / "checkpoints", log, every=config.checkpoint_every),
        max_time=config.max_time,
        devices=config.devices,
        num_nodes=config.num_nodes,
        **validation,
    )
    cost = arithmetic(module)
    print_plan(module, cost)
    print_learning_rate(config)
    fn.fit(trainer, module, folder / "checkpoints" / "last.ckpt")

    encoder = model.get_encoder()
    if config.recalibrate:
        see = nn.Sequential(module.resize, module.normalize)
        recalibrate(encoder, see, data.pretraining_images, config)
    state = {name: value.cpu() for name, value in encoder.state_dict().items()}
    fn.save_torch(folder / "encoder.pt", state)
    pace = statistics.median(row["images_per_second"] for row in log.rows)
    results = {
        "epochs": len(log.rows),
        "steps": len(log.rows) * len(module.batches),
        **cost,
        "seconds": round(sum(row["seconds"] for row in log.rows), 1),
        "pairs_per_second": round(pace * config.views / 2, 1),
        "final_loss": log.rows[-1]["train_loss"],
        "normalize": module.normalize.record(),
    }
    print(f"pretraining took {in_words(results['macs'])}")
    return Pretrained(results, log.rows)


def print_learning_rate(config: Optimisation) -> None:
    """The learning rate and its schedule, for people."""
    n, rate = config.effective_batch_size, f"{actual_learning_rate(config):g}"
    if config.scaling != "none":
        factor = {"linear": f"{n}/256", "sqrt": f"sqrt({n}/256)"}[config.scaling]
        rate = f"{config.base_learning_rate:g} x {factor} = {rate}"
    warmup = f"warm-up {warmup_epochs(config):g} of {config.epochs} epochs, then cosine"
    print(f"{config.optimizer}, learning rate {rate}, {warmup}", flush=True)


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def build_model(config: Config) -> SimCLRModel:
    """f(.) and g(.) as the settings have them, with the first weights of --seed."""
    torch.manual_seed(config.seed)
    encoder, feature_dim = build_encoder(
        *(config.encoder, config.stem, config.norm, config.activation),
        *(config.zero_init, config.width, config.feature_dim),
    )
    return SimCLRModel(
        encoder.to(memory_format=layout(config.machine.device)),
        feature_dim,
        hidden_dim=config.hidden_dim,
        embedding_dim=config.embedding_dim + config.beside_embedding,
        norm=config.head_norm or config.norm,
        layers=config.head_layers,
        dropout=config.head_dropout,
    )


def main(config: Config) -> None:
    beyond_h = config.needs_head
    file = encoder_file(config.checkpoint, beyond_h) if config.checkpoint else None
    config = as_trained(config, file, beyond_h) if file else config
    if file and config.evaluate_on:
        config = replace(config, dataset=config.evaluate_on)  # what the run's record is about
    run = fn.Run(config)
    if run.is_finished():
        return
    sets = load_sets(config, file)
    flag = "evaluate_on" if file and config.evaluate_on else "dataset"
    run.is_about(sets.description(file), flag)
    sets = sets.ready(config)
    config, data = at_learned_size(config, sets, file), sets.learned
    if config.finetune_flip is None:
        config = replace(config, finetune_flip=config.flip)
    check_data(data, config)

    model = build_model(config)
    encoder, cells = model.get_encoder(), config.probe_cells
    head = model.projection_head, config.probe_layer, config.beside_embedding
    measured = on_crops(up_to_layer(in_cells(encoder, cells), *head), config.ten_crops)
    untrained = copy.deepcopy(measured)
    recorded = load_trained(model, file, beyond_h) if file else None
    print_model(model, data, config)
    with run.open() as folder:
        results: dict[str, Any] = {}
        pretrained, evaluation = None, None
        if "pretrain" in config.stages_list:
            if fn.is_first_process(config):
                show_views(data.train_images, config, folder / "views.png")
            pretrained = pretrain(model, data, config, folder)
            results["pretrain"] = pretrained.results
        if config.stages_list != ["pretrain"]:
            normalize = recorded or fn.Normalize(data.pretraining_images)
            results |= as_shown(config, normalize, sets.measured)
            see = nn.Sequential(Resized(config.evaluation_size), normalize)
            if pretrained is None and config.recalibrate:
                recalibrate(encoder, see, data.pretraining_images, config)
            if config.needs_labels:
                evaluation = evaluate(
                    encoder=measured,
                    untrained=untrained,
                    normalize=normalize,
                    data=sets.measured,
                    settings=config,
                    folder=folder,
                    asked=to_be_asked(model, see, sets, config),
                )
                results |= evaluation.results()

        # The numbers first: nothing else is worth losing them.
        run.save(**results)
        if "features" in config.stages_list:
            save_features(nn.Sequential(see, measured), sets.measured, config.machine, folder)
        if pretrained is not None:
            figures.plot_pretraining(pretrained.rows, folder / "pretraining.png")
        if evaluation is not None:
            draw(evaluation, config, folder)


def to_be_asked(model: SimCLRModel, see: nn.Module, sets: Sets, config: Config) -> Asked | None:
    """What the stage certainty asks how sure it is: views as the last steps of pretraining saw."""
    if "certainty" not in config.stages_list:
        return None
    has_head = config.needs_head or "pretrain" in config.stages_list
    size, _ = crop_schedule(config.crop_size)[-1]
    return Asked(
        encoder=model.get_encoder(),
        head=model.projection_head if has_head else None,
        see=see,
        augment=lambda images: random_views(images, config, size, count=1),
        loss=config.loss,
        others=sets.others,
        people=sets.people,
        machine=config.machine,
    )


def show_views(images: Tensor, config: Config, file: Path, count: int = 10) -> None:
    """Draw `count` random images, and the views of each as the first step would see them."""
    torch.manual_seed(config.seed)
    chosen = images[torch.randperm(len(images))[:count]]
    size, _ = crop_schedule(config.crop_size)[0]
    figures.plot_views(chosen, random_views(chosen, config, size, config.views), file)


if __name__ == "__main__":
    fn.command_line(main, Config, __doc__)
