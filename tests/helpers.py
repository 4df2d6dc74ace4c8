"""Functions that several test files share; fixtures are in conftest.py."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

import functions as fn
import simCLR
from functions import UserError

# For tests of what surrounds the encoder: with a quarter of its channels, on maps a quarter as wide
# and as high, a ResNet trains in no time.
NARROW = ["--stem", "imagenet", "--width", 0.25]


@dataclass
class Config(fn.RunConfig):
    """The configuration of a script called script.py."""

    epochs: int = 3
    """passes over the images"""
    rate: float = 0.1
    """how fast to learn"""
    cell: Literal["rnn", "lstm"] = "rnn"
    """what to train"""


CPU = Config("digits", accelerator="cpu", precision="fp32")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def randint(high: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator).to(dtype)


def user_error(call, *args) -> str:
    """The message of the UserError that call(*args) must raise: one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert message.strip()
    assert len(message.splitlines()) == 1, message
    return message


def code_on_page(page: str, word: str) -> str:
    """The one block of Python on a page of the documentation in which a word stands."""
    text = (Path(fn.__file__).parent / page).read_text("utf-8")
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if word in code]
    return found


def make_config(**values) -> simCLR.Config:
    """A configuration of simCLR.py that gives the same everywhere."""
    defaults = {"dataset": "digits", "accelerator": "cpu", "precision": "fp32"}
    return simCLR.Config(**{**defaults, **values})


def assert_rate(count: int, n: int, p: float) -> None:
    """`count` of `n` is what chance gives with probability `p`."""
    assert binomtest(count, n, p).pvalue > 1e-3, f"{count} of {n} instead of {p}"


def cloned_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_bits(module: nn.Module, state: dict[str, Tensor]) -> None:
    now = module.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], state[name]) for name in state)
