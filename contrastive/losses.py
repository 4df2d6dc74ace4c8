"""The kin of NT-Xent: more than two views, the positive out of the denominator, and certainty."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import functions as fn
from functions import check, nt_xent_loss


@dataclass
class Loss(fn.Settings):
    """What is minimised."""

    title: ClassVar[str] = "loss"

    loss: Literal["nt_xent", "latent_class", "tau", "mc_infonce", "kappa"] = "nt_xent"
    """the paper: nt_xent; the others also learn how sure they are of an image"""
    temperature: float = 0.5
    """tau of the loss; what the losses tau and mc_infonce learn needs a low one, such as 0.05"""
    positives: Literal["each", "mean"] = "each"
    """with more than two views, a view is compared with each other view of its image in turn, or
    with their mean"""
    decoupled: bool = False
    """leave the positive out of the denominator (Yeh et al. 2022)"""

    def validate(self) -> None:
        super().validate()
        self.require("temperature", fn.POSITIVE)
        plain = self.loss == "nt_xent" or not self.decoupled
        check(plain, f"--decoupled is of nt_xent: leave it out with --loss {self.loss}")

    @property
    def beside_embedding(self) -> int:
        """Columns that the head puts out beside the embedding."""
        return 0 if self.loss == "nt_xent" else CERTAIN[self.loss].columns


def check_loss(config: Any) -> None:
    """Raises UserError where the other settings are nothing for the loss.

    Muon keeps the length of every weight. NT-Xent does not see it, but the others do: z, or what
    stands beside it, is not normalised.
    """
    if config.loss == "nt_xent":
        return
    name = f"--loss {config.loss}"
    check(config.views == 2, f"{name} compares two views: leave --views out")
    check(config.head_layers > 0, f"{name} needs a head that learns: leave --head_layers 0 out")
    check(config.embedding_dim > 1, f"{name} needs --embedding_dim of 2 at least")
    problem = f"{name} needs weights whose length may change"
    check(config.optimizer != "muon", f"{problem}: take another --optimizer than muon")


# ------------------------------------------------------------------------------------------------
# More views, and the positive out of the denominator
# ------------------------------------------------------------------------------------------------


def contrastive_loss(
    embeddings: Tensor,
    views: int = 2,
    temperature: float = 0.5,
    positives: str = "each",
    decoupled: bool = False,
    block: int | None = None,
) -> Tensor:
    """NT-Xent for M views of each of N images, averaged over all anchors. A scalar.

    embeddings: (M N, D); rows i, i + N, i + 2 N ... are the views of image i. positives:

    - each: an anchor z and each other view z+ of its image in turn. What else is of its image is
      left out, so that only views of other images are negatives (Tian et al. 2020, Poly-View of
      Shidani et al. 2024):

          -log( exp(sim(z, z+) / tau) / (exp(sim(z, z+) / tau) + sum over others of exp(...)) )

    - mean: NT-Xent between a view and the normalised mean of its image's other views.

    decoupled: the positive is left out of the denominator (Yeh et al. 2022, arXiv 2110.06848, Eq.
    6), so that a pair that is alike already still learns. With two views, and not decoupled, all
    of it is `nt_xent_loss`. Raises ValueError for rows that are no multiple of M.
    """
    if views < 2 or len(embeddings) % views or len(embeddings) == 0:
        shape = tuple(embeddings.shape)
        raise ValueError(f"embeddings must be (M N, D) with M = {views} >= 2, N >= 1, got {shape}")
    if views == 2 and not decoupled:
        return nt_xent_loss(embeddings, temperature, block)

    with torch.autocast(embeddings.device.type, enabled=False):
        z = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        z = F.normalize(z, dim=1)
        rows = block or (512 if z.device.type == "cpu" else 4096)
        if positives == "each" or views == 2:
            return EachPositive.apply(z, views, temperature, decoupled, rows)

        by_view = z.unflatten(0, (views, -1))  # (M, N, D)
        # The normalised mean of the others, which is their normalised sum.
        targets = F.normalize(by_view.sum(0) - by_view, dim=2)
        pairs = torch.cat([by_view, targets], dim=1)  # (M, 2 N, D): each view with its targets
        losses = [
            EachPositive.apply(pair, 2, temperature, decoupled, rows)
            if decoupled
            else nt_xent_loss(pair, temperature, block)
            for pair in pairs
        ]
        return torch.stack(losses).mean()


class EachPositive(torch.autograd.Function):
    """The loss of `contrastive_loss` with each positive, on unit vectors z (M N, D), and its
    gradient while each block of rows is at hand.

    For an anchor with logits s = sim / tau, let n = log of the sum of exp(s) over its negatives.
    Its loss with one positive p is log(exp(s_p) + exp(n)) - s_p = softplus(n - s_p), decoupled
    n - s_p. So with c_p = sigmoid(n - s_p), decoupled 1, the gradient with respect to its logits is

        -c_p / (M - 1) for a positive,   (mean of c_p) * exp(s_k - n) for a negative k.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, views: int, temperature: float, decoupled: bool, block: int
    ) -> Tensor:
        total, n = len(z), len(z) // views
        loss = z.new_zeros(())
        gradient = torch.zeros_like(z)
        turns = torch.arange(1, views, device=z.device) * n  # from a view to the image's others

        for start in range(0, total, block):
            rows = torch.arange(start, min(start + block, total), device=z.device)
            others = (rows.unsqueeze(1) + turns) % total  # (block, M - 1): the positives
            own = torch.cat([rows.unsqueeze(1), others], dim=1)  # (block, M): of the same image

            logits = (z[rows] / temperature) @ z.T  # (block, M N)
            positive = logits.gather(1, others)  # (block, M - 1)
            logits.scatter_(1, own, -torch.inf)  # what is left are the negatives
            negative = logits.logsumexp(1, keepdim=True)  # (block, 1)
            if decoupled:
                loss += (negative - positive).mean(1).sum()
                pull = torch.ones_like(positive)
            else:
                loss += F.softplus(negative - positive).mean(1).sum()
                pull = torch.sigmoid(negative - positive)

            if ctx.needs_input_grad[0]:
                slope = (logits - negative).exp_().mul_(pull.mean(1, keepdim=True))
                slope.scatter_(1, others, -pull / (views - 1))
                gradient[start : start + len(rows)].addmm_(slope, z)  # as anchors
                gradient.addmm_(slope.T, z[rows])  # as what anchors are compared with

        ctx.save_for_backward(gradient.div_(total * temperature))
        return loss / total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None, None


# ------------------------------------------------------------------------------------------------
# Losses that say how sure they are
# ------------------------------------------------------------------------------------------------

# Each compares two views, rows i and i + N, and takes what the head makes of them: embeddings, and
# where a certainty is learned beside them, its number in the last column. Certainties are (2N,),
# the higher the surer.

BETA = 0.8  # of latent_class: how sharp its softplus bends
FLOOR = 1e-4  # of latent_class: the least probability that is told from none
SAMPLES = 16  # of mc_infonce, for each image in each step
SHARE, PENALTY = 0.1, 0.005  # of kappa: what it adds to NT-Xent


def latent_classes(outputs: Tensor) -> Tensor:
    """p(c | x), the distribution over K latent classes: (B, K) -> (B, K), each row sums to 1.

    softplus(beta x) over its sum, by way of logarithms: where beta x is far below zero that of its
    softplus is beta x itself, and softplus alone would at last be too small for a float.
    """
    x = BETA * outputs
    log = torch.where(x < -15, x, F.softplus(x.clamp_min(-15)).log())
    return log.softmax(1)


def latent_class_loss(outputs: Tensor, temperature: float) -> Tensor:
    """The embedding as a distribution over K latent classes. (2N, K) -> a scalar.

    Two views match if they draw the same class, which they do with the probability
    <p_i, q_j> = sum over c of p(c | x_i) p(c | x_j). By Bayes, how much likelier x_j is as a view
    of x_i's class than at random is

        p(x_j | x_i) / p(x_j) = sum over c of p(c | x_i) p(c | x_j) / p(c) = K <p_i, q_j>

    where all classes are as frequent, and views of a class are independent: the score that InfoNCE
    looks for (van den Oord et al. 2018, arXiv 1807.03748, Eq. 2). So the logits are
    log(N <p_i, q_j>) / tau, with a factor that no softmax sees, and the loss is their cross-entropy
    in both directions. At tau = 1 that is Bayes; a lower one sharpens it. Chances below FLOOR count
    as FLOOR: a pair that shares no class has no gradient.

    The negatives of a first view are the second views of the other images, and the other way round.
    A distribution over few classes is sure, one over all matches whatever there is, and certainty
    is 1 - H(p) / log K.
    """
    p, q = latent_classes(outputs).chunk(2)
    logits = (len(p) * (p @ q.T).clamp_min(FLOOR)).log() / temperature
    own = torch.arange(len(p), device=p.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def latent_class_certainty(outputs: Tensor) -> Tensor:
    """1 - H(p) / log K: (B, K) -> (B,), 1 where all of p is in one class, 0 where it is in each."""
    p = latent_classes(outputs)
    return 1 - torch.special.entr(p).sum(1) / math.log(p.shape[1])


def tau_loss(outputs: Tensor, temperature: float) -> Tensor:
    """Temperature as uncertainty (Zhang et al. 2021, arXiv 2110.04403). (2N, D + 1) -> a scalar.

    NT-Xent, where each image has a say in its temperature: its logits are c_i sim(z_i, z_k) / tau
    with c_i = sigmoid(u_i). With p_ik the softmax of those logits, the slope of its loss is

        d l_i / d c_i = (sum over k of p_ik sim(z_i, z_k) - sim(z_i, z_i+)) / tau

    so that c_i grows as long as the partner is nearer than the others are, weighted as the softmax
    weights them. An image that is like many others loses less if it claims less: certainty is c.
    """
    z, u = F.normalize(outputs[:, :-1], dim=1), outputs[:, -1:]
    logits = torch.sigmoid(u) * (z @ z.T) / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    positive = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(logits, positive)


def tau_certainty(outputs: Tensor) -> Tensor:
    """c, the share of its logits that an image claims: (B, D + 1) -> (B,), between 0 and 1."""
    return torch.sigmoid(outputs[:, -1])


def concentration(outputs: Tensor) -> Tensor:
    """kappa > 0 (B,) of the last column, (B, D + 1): near 8 D where that is 0, as it begins."""
    start = 8 * (outputs.shape[1] - 1)
    return F.softplus(outputs[:, -1]) * (start / math.log(2))


def mc_infonce_loss(outputs: Tensor, temperature: float) -> Tensor:
    """The embedding as a distribution on the sphere. (2N, D + 1) -> a scalar.

    After MCInfoNCE (Kirchhof et al. 2023, arXiv 2302.02865): an image that is ambiguous has many
    embeddings that would do. Each has a direction mu and a concentration kappa here, S samples z
    are drawn of each, and the likelihood that NT-Xent takes the logarithm of is averaged over
    them. Certainty is kappa.

    The paper draws from the von Mises-Fisher distribution, and negatives from a bank. Here the
    Power Spherical one takes its place, which needs no rejection, and negatives are the batch's;
    the paper's kappa of positives is 1 / tau.
    """
    mu, kappa = F.normalize(outputs[:, :-1], dim=1), concentration(outputs)
    return mean_likelihood(power_spherical(mu, kappa, SAMPLES), temperature)


def mean_likelihood(samples: Tensor, temperature: float) -> Tensor:
    """MCInfoNCE's loss of samples (S, 2N, D), averaged over the 2N anchors.

        l_i = log S - logsumexp over s of (z_i z_i+ / tau - logsumexp over k != i of z_i z_k / tau)

    With kappa at infinity all samples are mu, and it is NT-Xent.
    """
    count = samples.shape[1]
    rows = torch.arange(count, device=samples.device)
    positive = rows.roll(count // 2)

    def log_p(z: Tensor) -> Tensor:
        """Of the positives, with one sample of each: (2N, D) -> (2N,)."""
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        return logits.log_softmax(1)[rows, positive]

    # A (2N, 2N) matrix for each sample would be too much to keep: each is computed once more for
    # the gradient.
    again = functools.partial(checkpoint, log_p, use_reentrant=False, preserve_rng_state=False)
    of_positive = torch.stack([again(z) for z in samples])  # (S, 2N)
    return (math.log(len(samples)) - of_positive.logsumexp(0)).mean()


def power_spherical(mu: Tensor, kappa: Tensor, samples: int) -> Tensor:
    """Samples (S, B, D) around unit vectors mu (B, D), with a gradient for mu and kappa (B,).

    The Power Spherical distribution (De Cao & Aziz 2020, arXiv 2006.04437, Algorithm 1), density
    proportional to (1 + mu . z)^kappa: a height t = mu . z, a uniform direction around the pole,
    and a reflection that brings the pole to mu. Its mean is mu kappa / (kappa + D - 1).
    """
    dim = mu.shape[1]
    half = torch.full_like(kappa, (dim - 1) / 2)
    # 1 - t rather than t: near the pole t is 1 but for less than floats tell apart.
    beta = torch.distributions.Beta(half, half + kappa, validate_args=False)
    s = beta.rsample((samples,)).clamp(1e-12, 1)  # (S, B)
    normal = torch.randn(samples, len(mu), dim - 1, dtype=mu.dtype, device=mu.device)
    around = F.normalize(normal, dim=2)
    y = torch.cat([(1 - 2 * s).unsqueeze(2), (2 * (s * (1 - s)).sqrt()).unsqueeze(2) * around], 2)

    pole = torch.zeros_like(mu)
    pole[:, 0] = 1
    u = F.normalize(pole - mu, dim=1)
    return y - 2 * (y * u).sum(2, keepdim=True) * u


def kappa_certainty(outputs: Tensor) -> Tensor:
    """kappa > 0, how closely an image's views lie together: (B, D + 1) -> (B,)."""
    return F.softplus(outputs[:, -1])


def kappa_loss(outputs: Tensor, temperature: float) -> Tensor:
    """NT-Xent with a concentration beside it (after Li et al. 2024, arXiv 2405.16460). (2N, D + 1)
    -> a scalar.

    What is added is - lambda (kappa_1 + kappa_2) mu_1 . mu_2, and an l2 penalty on kappa, of weight
    w. It is least where kappa = lambda mu_1 . mu_2 / (2 w), ten times the cosine here: kappa says
    how much alike an image's views are, and is certainty.
    """
    first, second = F.normalize(outputs[:, :-1], dim=1).chunk(2)
    one, other = kappa_certainty(outputs).chunk(2)
    alike = (first * second).sum(1)  # (N,)
    added = PENALTY * (one**2 + other**2) - SHARE * (one + other) * alike
    return nt_xent_loss(outputs[:, :-1], temperature) + added.mean()


class Certain(NamedTuple):
    """A loss (2N, columns) -> a scalar that learns a certainty (B, columns) -> (B,), and the
    columns that it needs beside the embedding."""

    loss: Callable[[Tensor, float], Tensor]
    certainty: Callable[[Tensor], Tensor]
    columns: int


CERTAIN = {
    "latent_class": Certain(latent_class_loss, latent_class_certainty, 0),
    "tau": Certain(tau_loss, tau_certainty, 1),
    "mc_infonce": Certain(mc_infonce_loss, concentration, 1),
    "kappa": Certain(kappa_loss, kappa_certainty, 1),
}


def certain_loss(outputs: Tensor, loss: str, temperature: float) -> Tensor:
    """One of CERTAIN of what the head puts out, (2N, columns), in float32. A scalar."""
    with torch.autocast(outputs.device.type, enabled=False):
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        return CERTAIN[loss].loss(wide, temperature)
