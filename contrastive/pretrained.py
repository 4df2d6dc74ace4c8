"""An encoder that was trained before: its weights, its architecture, and how to show it images."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import nn

import functions as fn
from contrastive.encoders import EncoderName
from functions import UserError, check

ConfigT = TypeVar("ConfigT", bound=fn.RunConfig)

ARCHITECTURE = ("encoder", "stem", "norm", "activation", "zero_init", "width", "feature_dim")
VIEWS = (
    *("crop_size", "crop_scale", "crop_scale_max", "flip"),
    *("jitter_strength", "jitter", "grayscale", "blur"),
)
HEAD = ("head_layers", "hidden_dim", "embedding_dim", "head_norm", "loss")


def check_encoder(name: str, stem: str, zero_init: bool) -> None:
    """Raises UserError for an encoder that does not exist, or not with these settings."""
    known = get_args(EncoderName)
    check(name in known, f"--encoder {name} is unknown; choose from {', '.join(known)}")
    check(stem in ("cifar", "imagenet"), f"--stem {stem} is unknown; choose cifar or imagenet")
    given = {"--stem imagenet": stem == "imagenet", "--zero_init": zero_init}
    flags = " and ".join(flag for flag, is_given in given.items() if is_given)
    problem = f"{flags}: that is of ResNets, not of --encoder {name}"
    check(name != "compact" or not flags, f"{problem}: leave it out, or take a ResNet")


def encoder_file(checkpoint: str, head: bool = False) -> Path:
    """The file that --checkpoint names, or the encoder in the run folder that it names.

    head: what has the head, too, which is a checkpoint. Raises UserError.
    """
    named = Path(checkpoint)
    if not named.is_dir():
        check(named.is_file(), f"--checkpoint {named}: no such file")
        return named
    names = ["checkpoints/last.ckpt"] if head else ["encoder.pt", "checkpoints/last.ckpt"]
    found = next((named / name for name in names if (named / name).is_file()), None)
    if found is None:
        lacking = "no checkpoints/last.ckpt" if head else f"neither {' nor '.join(names)}"
        problem = f"--checkpoint {named} has {lacking}"
        raise UserError(f"{problem}: give the folder of a run that has pretrained, or a file")
    return found


def content(file: Path) -> str:
    """A hash of a file, to tell whether a resumed run is about the same encoder."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:32]


def has_head(checkpoint: str) -> bool:
    """Whether what --checkpoint names has the head, too: a checkpoint, or a folder with one."""
    named = Path(checkpoint)
    return named.suffix == ".ckpt" or (named / "checkpoints/last.ckpt").is_file()


def run_of(file: Path) -> Path | None:
    """The run folder that a checkpoint lies in; None for one that was taken out of it."""
    near = (file.parent, file.parent.parent)
    return next((folder for folder in near if (folder / "config.yaml").is_file()), None)


def as_trained(config: ConfigT, file: Path, head: bool = False) -> ConfigT:
    """The configuration with the architecture that the run of a checkpoint had, and its views.

    head: of its head, too. Raises UserError where a flag says otherwise.
    """
    names = ARCHITECTURE + (HEAD if head else ())
    run = run_of(file)
    if run is None:
        taken = ", ".join(f"--{name} {getattr(config, name)}" for name in names)
        print(f"there is no config.yaml beside {file}: it is taken for an encoder of {taken}")
        return config
    trained = fn.load_config(type(config), run / "config.yaml")
    recorded = {name: getattr(trained, name) for name in names + VIEWS}
    for name, value in recorded.items():
        given, default = getattr(config, name), getattr(type(config), name)
        problem = f"--{name} {given}: the run of --checkpoint {file} had {value}"
        check(given in (value, default), f"{problem}: leave it out")
    tell_of_classes(config, trained)
    return replace(config, **recorded)


def tell_of_classes(config: Any, trained: Any) -> None:
    """Say where the encoder has not seen the classes that it is measured on, or has seen those that
    are left out."""
    if config.left_out == trained.left_out or config.evaluate_on is not None:
        return
    seen = [name for name in config.left_out if name not in trained.left_out]
    unseen = [name for name in trained.left_out if name not in config.left_out]
    if seen:
        print(f"the encoder has been trained on {', '.join(seen)}: only the probe has not seen it")
    if unseen:
        print(f"the encoder has been trained without {', '.join(unseen)}")


def image_side(file: Path) -> int | None:
    """The side in pixels of the images that an encoder was trained on; None without a record."""
    run = run_of(file)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return (
            int(json.loads((run / "data.json").read_text("utf-8"))["image_size"]) if run else None
        )
    return None


def load_encoder(encoder: nn.Module, file: Path) -> None:
    """Load weights from an encoder.pt, or from a checkpoint of this script.

    Read as data, never as code. Raises UserError.
    """
    remedy = "give the --encoder, --stem, --norm, --width and --feature_dim it was trained with"
    load_part(encoder, file, "model.encoder.", f"is of another encoder: {remedy}")


def load_model(model: nn.Module, file: Path) -> None:
    """Load encoder and head from a checkpoint of this script, likewise. Raises UserError."""
    remedy = "give checkpoints/last.ckpt of its run; outside of it, --loss and its head's flags too"
    load_part(model, file, "model.", f"does not hold this encoder and its head: {remedy}")


def load_part(part: nn.Module, file: Path, prefix: str, problem: str) -> None:
    """Load the weights whose names begin so in a checkpoint, or a file of nothing else.

    problem: what to say of a file with other weights. Raises UserError.
    """
    check(file.is_file(), f"--checkpoint {file}: no such file")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if "state_dict" in state:
            whole = state["state_dict"]
            state = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
        found = {name: value.shape for name, value in state.items()}
    except Exception:  # a damaged file can fail in many ways
        damaged = f"--checkpoint {file} is damaged, or no checkpoint at all"
        raise UserError(f"{damaged}: take another file") from None

    expected = {name: value.shape for name, value in part.state_dict().items()}
    check(found == expected, f"--checkpoint {file} {problem}")
    part.load_state_dict(state)


def load_normalize(file: Path) -> fn.Normalize | None:
    """How the encoder's own training images were normalised; None where there is no record.

    An encoder sees other images as it saw those: with their statistics it would see a grey photo
    as it saw a bright one. The record is in the checkpoint itself, or else in the run's
    results.json, or in the checkpoint of a run that has no results yet.
    """
    run = run_of(file)
    beside = [run / "results.json", run / "checkpoints" / "last.ckpt"] if run else []
    for source in (file, *beside):
        # What is not there, damaged, or of another kind is no record.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, UserError):
            mean, std = recorded_statistics(source)
            return fn.Normalize.of(torch.as_tensor(mean), torch.as_tensor(std))
    return None


def load_trained(model: Any, file: Path, head: bool = False) -> fn.Normalize | None:
    """Load the encoder of a SimCLRModel, or with its head the whole of it; how it was shown its
    images, and says so if there is no record of that. Raises UserError."""
    if head:
        load_model(model, file)
        run = run_of(file)
        kept = run / "encoder.pt" if run and file.name == "last.ckpt" else None
        if kept is not None and kept.is_file():
            load_encoder(model.encoder, kept)  # which pretraining may have left recalibrated
    else:
        load_encoder(model.encoder, file)
    normalize = load_normalize(file)
    if normalize is None:
        print(f"there is no record of how {file} saw its images: by this set's own statistics")
    return normalize


def recorded_statistics(source: Path) -> tuple[Any, Any]:
    """Mean and deviation of each channel, as a results.json or a checkpoint has them."""
    if source.suffix == ".json":
        normalize = json.loads(source.read_text("utf-8"))["pretrain"]["normalize"]
        return normalize["mean"], normalize["std"]
    state = fn.load_checkpoint(source)["state_dict"]
    return state["normalize.mean"], state["normalize.std"]
