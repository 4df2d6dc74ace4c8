"""Losses that learn how sure they are, against slow transcriptions, closed forms and limits."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import NARROW, make_config, randn, user_error

import functions as fn
import simCLR
from contrastive import losses, representation
from contrastive.losses import CERTAIN, certain_loss, mean_likelihood, power_spherical

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")

RANDOM = "mc_infonce"
EXACT = [name for name in CERTAIN if name != RANDOM]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x, beta=1.0):
    return math.log(1 + math.exp(beta * x)) / beta


def cosine(a, b):
    return float(F.cosine_similarity(a, b, dim=0))


# ------------------------------------------------------------------------------------------------
# What they are
# ------------------------------------------------------------------------------------------------


def slow_latent_class(outputs, tau):
    n = len(outputs) // 2
    p = []
    for row in outputs.tolist():
        raw = [softplus(x, 0.8) for x in row]
        p.append([value / sum(raw) for value in raw])

    def chance(i, j):
        return max(1e-4, sum(a * b for a, b in zip(p[i], p[n + j], strict=True)))

    match = [[chance(i, j) for j in range(n)] for i in range(n)]
    total = 0.0
    for i in range(n):
        forth = sum((n * match[i][j]) ** (1 / tau) for j in range(n))
        back = sum((n * match[j][i]) ** (1 / tau) for j in range(n))
        own = (n * match[i][i]) ** (1 / tau)
        total -= (math.log(own / forth) + math.log(own / back)) / 2
    return total / n


def slow_tau(outputs, tau):
    total, count = 0.0, len(outputs)
    for i in range(count):
        c = sigmoid(float(outputs[i, -1]))
        logits = [c * cosine(outputs[i, :-1], outputs[k, :-1]) / tau for k in range(count)]
        below = sum(math.exp(logits[k]) for k in range(count) if k != i)
        total -= math.log(math.exp(logits[(i + count // 2) % count]) / below)
    return total / count


def slow_kappa(outputs, tau):
    n = len(outputs) // 2
    added = 0.0
    for i in range(n):
        one, other = (softplus(float(outputs[row, -1])) for row in (i, i + n))
        alike = cosine(outputs[i, :-1], outputs[i + n, :-1])
        added += losses.PENALTY * (one**2 + other**2) - losses.SHARE * (one + other) * alike
    return float(fn.nt_xent_loss(outputs[:, :-1], tau)) + added / n


SLOW = {"latent_class": slow_latent_class, "tau": slow_tau, "kappa": slow_kappa}


@pytest.mark.parametrize("loss", EXACT)
@pytest.mark.parametrize(("tau", "size"), [(0.2, 3), (1.0, 3), (0.5, 30)])
def test_the_loss_is_its_formula(loss, tau, size):
    """With 30 latent classes are so certain that some images have none in common."""
    outputs = size * randn(10, 6)
    expected = SLOW[loss](outputs, tau)
    assert float(certain_loss(outputs, loss, tau)) == pytest.approx(expected, rel=1e-9)


def test_the_mean_likelihood_is_its_formula():
    samples, tau = F.normalize(randn(3, 8, 4), dim=2), 0.3
    total = 0.0
    for i in range(8):
        likelihoods = []
        for z in samples:
            near = [math.exp(float(z[i] @ z[k]) / tau) for k in range(8)]
            below = sum(near) - near[i]
            likelihoods.append(near[(i + 4) % 8] / below)
        total -= math.log(sum(likelihoods) / 3)
    assert float(mean_likelihood(samples, tau)) == pytest.approx(total / 8, rel=1e-9)


def test_mc_infonce_is_the_mean_likelihood_of_samples_around_each_image():
    """Sixteen of each, around mu with kappa = 8 D softplus(u) / log 2; and so is its gradient."""
    outputs = randn(8, 6).requires_grad_()
    torch.manual_seed(3)
    ours = certain_loss(outputs, "mc_infonce", 0.3)
    torch.manual_seed(3)
    kappa = 40 / math.log(2) * F.softplus(outputs[:, 5])
    samples = power_spherical(F.normalize(outputs[:, :5], dim=1), kappa, 16)
    expected = mean_likelihood(samples, 0.3)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    found, known = (torch.autograd.grad(loss, outputs)[0] for loss in (ours, expected))
    torch.testing.assert_close(found, known)
    assert found[:, 5].abs().min() > 1e-6


@pytest.mark.parametrize("loss", EXACT)
def test_its_gradient_is_that_of_the_loss(loss):
    outputs = randn(8, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: certain_loss(x, loss, 0.4), (outputs,))


def test_the_gradient_of_the_mean_likelihood():
    samples = F.normalize(randn(3, 6, 4), dim=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: mean_likelihood(z, 0.4), (samples,))


def test_the_mean_likelihood_keeps_no_matrix_of_similarities():
    """Of 64 rows, each with 64 others; what is kept are samples (64, 4) and numbers (64,)."""
    samples, kept = F.normalize(randn(5, 64, 4), dim=2).requires_grad_(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    )
    with hooks:
        mean_likelihood(samples, 0.4)
    assert max(kept) <= samples.numel() < 64 * 64


def test_nor_does_the_order_of_images_matter_to_the_mean_likelihood():
    samples = F.normalize(randn(3, 2, 7, 4), dim=3)
    order = torch.randperm(7)
    found = [
        float(mean_likelihood(part.flatten(1, 2), 0.3))
        for part in (samples, samples[:, :, order], samples.flip(1), samples.flip(0))
    ]
    assert found == pytest.approx([found[0]] * 4, rel=1e-12)


@pytest.mark.parametrize("loss", EXACT)
def test_neither_the_order_of_images_nor_of_views_matters(loss):
    outputs = randn(2, 7, 5)
    order = torch.randperm(7)
    found = [
        float(certain_loss(part.flatten(0, 1), loss, 0.3))
        for part in (outputs, outputs[:, order], outputs.flip(0))
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)


# ------------------------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------------------------


def test_samples_that_are_all_the_mean_give_nt_xent():
    mu = F.normalize(randn(12, 5), dim=1)
    ours = mean_likelihood(mu.expand(4, 12, 5), 0.3)
    assert float(ours) == pytest.approx(float(fn.nt_xent_loss(mu, 0.3)), rel=1e-9)


@pytest.mark.parametrize("dim", [2, 16, 128])
def test_mc_infonce_is_nt_xent_for_certain_images(dim):
    outputs = randn(12, dim + 1, dtype=torch.float32)
    outputs[:, -1] = 1e5  # of kappa / (8 D / log 2)
    ours = float(certain_loss(outputs, "mc_infonce", 0.3))
    assert ours == pytest.approx(float(fn.nt_xent_loss(outputs[:, :-1], 0.3)), abs=0.02)


def test_tau_is_nt_xent_where_all_are_sure():
    outputs = randn(12, 6)
    outputs[:, -1] = 50
    expected = float(fn.nt_xent_loss(outputs[:, :-1], 0.3))
    assert float(certain_loss(outputs, "tau", 0.3)) == pytest.approx(expected, rel=1e-9)


def test_tau_claims_less_for_an_image_that_looks_like_others():
    """Its optimum c falls with how near the negatives are to the positive."""
    mu = F.normalize(randn(20, 8), dim=1)
    mu[10:] = F.normalize(mu[:10] + 0.1 * mu[10:], dim=1)  # views of an image are alike
    mu[1], mu[11] = mu[0], mu[10]  # two images that nobody can tell apart
    u = torch.zeros(20, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([u], lr=20)
    for _ in range(200):
        optimizer.zero_grad()
        certain_loss(torch.cat([mu, u], 1), "tau", 0.1).backward()
        optimizer.step()
    certainty = CERTAIN["tau"].certainty(torch.cat([mu, u], 1))
    doubtful = torch.tensor([0, 1, 10, 11])
    others = torch.tensor([i for i in range(20) if i not in doubtful])
    assert certainty[doubtful].max() < certainty[others].min()


def test_kappa_becomes_how_much_alike_the_views_are():
    """lambda cos / (2 penalty), where the derivative is zero."""
    mu = F.normalize(randn(8, 6), dim=1)
    mu[4:] = F.normalize(mu[:4] + 0.5 * mu[4:], dim=1)
    u = torch.zeros(8, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([u], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = certain_loss(torch.cat([mu, u], 1), "kappa", 0.5)
        loss.backward()
        return loss

    optimizer.step(closure)
    kappa = CERTAIN["kappa"].certainty(torch.cat([mu, u], 1).detach())
    alike = (mu[:4] * mu[4:]).sum(1).repeat(2)
    torch.testing.assert_close(
        kappa, losses.SHARE * alike / (2 * losses.PENALTY), rtol=1e-4, atol=0
    )


def test_one_class_is_sure_and_all_classes_are_not():
    sure = torch.full((1, 16), -1e4)
    sure[0, 3] = 1e4
    certainty = CERTAIN["latent_class"].certainty
    assert float(certainty(sure)) == pytest.approx(1, abs=1e-6)
    assert float(certainty(torch.zeros(1, 16))) == pytest.approx(0, abs=1e-6)
    half = torch.tensor([[5.0, 5.0] + [-1e4] * 14])
    assert float(certainty(half)) == pytest.approx(1 - math.log(2) / math.log(16), rel=1e-5)


@pytest.mark.parametrize("size", [-10.0, -60.0, -1e3])
def test_of_no_class_is_not_sure(size):
    """Outputs that are all as low are no class more than another, however low; in float32."""
    outputs = torch.full((2, 16), size)
    outputs[1, 0] += 2
    p = losses.latent_classes(outputs.requires_grad_())
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    torch.testing.assert_close(p[0], torch.full((16,), 1 / 16))
    assert (p[1, 0] / p[1, 1]).item() == pytest.approx(math.exp(0.8 * 2), rel=1e-3)
    assert CERTAIN["latent_class"].certainty(outputs)[0].item() == pytest.approx(0, abs=1e-6)
    p[1, 0].log().backward()
    assert outputs.grad.isfinite().all()
    assert float(outputs.grad[1, 0]) > 0.1


# ------------------------------------------------------------------------------------------------
# The sampler
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3, 16, 512])
@pytest.mark.parametrize("kappa", [0.5, 20.0, 3000.0])
def test_samples_have_the_moments_of_the_power_spherical_distribution(dim, kappa):
    """Of length 1; mean mu kappa / (kappa + D - 1); a Beta's spread of heights; none aside."""
    n = 20_000 if dim < 100 else 4_000
    mu = F.normalize(randn(2, dim), dim=1)
    z = power_spherical(mu, torch.full((2,), kappa, dtype=torch.float64), n)  # (n, 2, D)
    assert z.shape == (n, 2, dim)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(n, 2, dtype=z.dtype))

    height = (z * mu).sum(2)  # (n, 2)
    a, b = (dim - 1) / 2 + kappa, (dim - 1) / 2
    mean = kappa / (kappa + dim - 1)
    variance = 4 * a * b / ((a + b) ** 2 * (a + b + 1))
    error = math.sqrt(variance / n)
    assert (height.mean(0) - mean).abs().max() < 5 * error
    assert height.var(0).tolist() == pytest.approx([variance] * 2, rel=0.1)
    aside = z.mean(0) - height.mean(0)[:, None] * mu  # no direction around mu is preferred
    assert aside.norm(dim=1).max() < 5 * math.sqrt((1 - mean**2) / n)
    together = torch.corrcoef(height.T)[0, 1]  # each image has samples of its own
    assert abs(float(together)) < 5 / math.sqrt(n)


@pytest.mark.parametrize("dim", [3, 9])
def test_around_mu_all_directions_are_as_likely(dim):
    """Of D - 1 coordinates around the pole, E[x_i x_j] = 0 and E[x^4] = 3 / (m (m + 2)), m = D - 1:
    of points drawn from a cube the second is less."""
    n, m = 40_000, dim - 1
    mu = torch.zeros(1, dim, dtype=torch.float64)
    mu[0, 0] = 1
    z = power_spherical(mu, torch.tensor([5.0], dtype=torch.float64), n)[:, 0]
    x = F.normalize(z[:, 1:], dim=1)
    covariance = x.T @ x / n
    assert (covariance - torch.eye(m) / m).abs().max() < 5 / (m * math.sqrt(n))
    fourth = (x**4).mean(0)
    assert (fourth - 3 / (m * (m + 2))).abs().max() < 0.02 / m


@pytest.mark.parametrize("dim", [2, 3, 16])
@pytest.mark.parametrize("kappa", [0.5, 20.0, 3000.0])
def test_the_samples_carry_the_gradient_of_their_height(dim, kappa):
    """Of E[t] = kappa / (kappa + D - 1) with respect to kappa, (D - 1) / (kappa + D - 1)^2."""
    mu, k = F.normalize(randn(1, dim), dim=1), torch.tensor([kappa], dtype=torch.float64)
    height = (power_spherical(mu, k.requires_grad_(), 40_000) * mu).sum(2).mean()
    (found,) = torch.autograd.grad(height, k)
    assert float(found) == pytest.approx((dim - 1) / (kappa + dim - 1) ** 2, rel=0.05)


@pytest.mark.parametrize("dim", [2, 3, 16])
@pytest.mark.parametrize("kappa", [0.5, 20.0])
def test_the_samples_carry_the_gradient_of_their_mean(dim, kappa):
    """Of E[a . z] = a . mu kappa / (kappa + D - 1), whose gradient is known."""
    n = 40_000
    m, a = randn(1, dim, seed=1), randn(dim, seed=2)
    k = torch.tensor([kappa], dtype=torch.float64)

    def gradients(expectation):
        direction, concentration = m.clone().requires_grad_(), k.clone().requires_grad_()
        value = expectation(F.normalize(direction, dim=1), concentration)
        return torch.autograd.grad(value, (direction, concentration))

    sampled = gradients(lambda mu, k: (power_spherical(mu, k, n) @ a).mean())
    exact = gradients(lambda mu, k: (mu @ a * k / (k + dim - 1)).sum())
    for ours, theirs in zip(sampled, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.02)


def test_the_pole_itself_is_no_exception():
    """Where the reflection has no direction: mu is the pole."""
    mu = torch.zeros(1, 5)
    mu[0, 0] = 1
    mu.requires_grad_()
    z = power_spherical(mu, torch.tensor([50.0]), 1000)
    assert float((z @ mu[0]).detach().mean()) == pytest.approx(50 / 54, abs=0.02)
    z.sum().backward()
    assert mu.grad.isfinite().all()


@pytest.mark.parametrize("dim", [2, 16, 512])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 1e3, 1e6])
def test_no_concentration_breaks_it(dim, kappa):
    """Finite loss and gradient, in float32."""
    y = kappa * math.log(2) / (8 * dim)
    outputs = randn(16, dim + 1, dtype=torch.float32)
    outputs[:, -1] = y + math.log(-math.expm1(-y))  # whose softplus is y
    assert losses.concentration(outputs).tolist() == pytest.approx([kappa] * 16, rel=1e-3)
    outputs.requires_grad_()
    loss = certain_loss(outputs, "mc_infonce", 0.1)
    loss.backward()
    assert loss.isfinite()
    assert outputs.grad.isfinite().all()


@pytest.mark.parametrize("loss", CERTAIN)
@pytest.mark.parametrize("size", [0.0, 1e-6, 1e4])
def test_embeddings_of_any_length_are_taken(loss, size):
    outputs = (size * randn(16, 9, dtype=torch.float32)).requires_grad_()
    found = certain_loss(outputs, loss, 0.1)
    found.backward()
    assert found.isfinite()
    assert outputs.grad.isfinite().all()


def test_concentration_begins_near_eight_times_the_dimension():
    assert losses.concentration(torch.zeros(3, 17)).tolist() == pytest.approx([128.0] * 3)


@pytest.mark.parametrize("loss", CERTAIN)
def test_it_is_computed_in_float32_under_autocast(loss):
    outputs = randn(12, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        found = certain_loss(outputs, loss, 0.1)
    assert found.dtype == torch.float32
    torch.manual_seed(0)
    assert torch.equal(found, certain_loss(outputs.float(), loss, 0.1))


# ------------------------------------------------------------------------------------------------
# In the script
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"views": 4}, "--views"),
        ({"decoupled": True}, "--decoupled"),
        ({"head_layers": 0}, "--head_layers"),
        ({"embedding_dim": 1}, "--embedding_dim"),
    ],
)
@pytest.mark.parametrize("loss", CERTAIN)
def test_what_it_cannot_do_is_said(loss, values, flag):
    message = user_error(make_config(loss=loss, **values).validate)
    assert flag in message
    assert f"--loss {loss}" in message


@pytest.mark.parametrize(
    "loss", [pytest.param(name, marks=[pytest.mark.slow] * (name != "tau")) for name in CERTAIN]
)
def test_it_trains_is_measured_and_resumes_to_the_bit(loss, image_folder, run_here, tmp_path):
    flags = ["--dataset", image_folder, "--image_size", 8, *NARROW, "--epochs", 2]
    flags += ["--batch_size", 32, "--accelerator", "cpu", "--precision", "fp32", "--loss", loss]
    flags += ["--embedding_dim", 16, "--stages", "pretrain", "--checkpoint_every", 0, "--flip", 0]
    whole = run_here("simCLR.py", *flags, "--output_dir", "whole", cwd=tmp_path)
    assert (whole.returncode, whole.stderr) == (0, "")
    part = [*flags, "--output_dir", "parts", "--max_time", "00:00:00:01"]
    assert run_here("simCLR.py", *part, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "parts/results.json").exists()  # it has something left to do
    done = run_here("simCLR.py", "--resume", "parts", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    )
    assert any(name.startswith("model.projection_head") for name in ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

    flags = ["--dataset", image_folder, "--image_size", 8, "--checkpoint", "whole", "--knn_k", 5]
    flags += ["--stages", "knn", "--no-baselines", "--probe_layer", 2, "--output_dir", "z"]
    done = run_here("simCLR.py", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "z/results.json").read_text())["knn"]["accuracy"] > 0.6


@pytest.mark.parametrize("loss", EXACT)
def test_micro_batches_give_the_same_gradient(loss, monkeypatch):
    """As for NT-Xent: of all embeddings there is one loss."""
    seen = []
    for micro in (None, 8):
        torch.manual_seed(0)
        config = make_config(
            loss=loss, batch_size=16, micro_batch_size=micro, embedding_dim=8, norm="group",
            stem="imagenet", crop_size=8, crop_scale=1.0, flip=0.0, jitter=0.0, grayscale=0.0,
        )  # fmt: skip
        encoder, width = simCLR.build_encoder("resnet18", "imagenet", "group")
        columns = config.embedding_dim + config.beside_embedding
        model = simCLR.SimCLRModel(encoder, width, 32, columns, "group")
        images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
        kind = simCLR.Pretraining if micro is None else simCLR.CachedPretraining
        module = kind(model, images, None, config)
        seen.append(one_step(module, monkeypatch))
    for name, gradient in seen[0].items():
        torch.testing.assert_close(gradient, seen[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("loss", "layers", "columns"), [("tau", 2, 8), ("nt_xent", 0, 512)])
def test_the_signals_are_of_the_embedding_alone(loss, layers, columns, monkeypatch):
    """Without what stands beside it, and of all of h where there is no head."""
    config = make_config(loss=loss, batch_size=4, embedding_dim=8, head_layers=layers)
    encoder, width = simCLR.build_encoder("resnet18", "imagenet")
    size = config.embedding_dim + config.beside_embedding
    model = simCLR.SimCLRModel(encoder, width, 16, size, "batch", layers)
    module = simCLR.Pretraining(model, torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None, config)
    widths = []
    monkeypatch.setattr(simCLR.Pretraining, "watch", lambda _, z, views: widths.append(z.shape[1]))
    one_step(module, monkeypatch)
    assert widths == [columns]


def test_z_is_measured_without_what_stands_beside_it():
    encoder, width = simCLR.build_encoder("resnet18", "imagenet")
    model = simCLR.SimCLRModel(encoder, width, 16, 9)
    x = torch.rand(2, 3, 8, 8)
    head = model.projection_head
    whole, z, hidden = (
        representation.up_to_layer(encoder, head, layer, beside).eval()(x)
        for layer, beside in ((2, 0), (2, 1), (1, 1))
    )
    assert torch.equal(z, whole[:, :8])
    assert (whole.shape[1], hidden.shape[1]) == (9, 16)


def one_step(module, monkeypatch):
    """The gradient of each weight after one step of training."""
    found = {}

    def note(optimizer):
        found.update({n: p.grad.clone() for n, p in module.model.named_parameters()})

    monkeypatch.setattr(type(module), "on_before_optimizer_step", lambda self, opt: note(opt))
    machine = make_config(accelerator="cpu", precision="fp32").machine
    trainer = fn.make_trainer(machine, 0, 1, fn.EpochLog(quiet=True), limit_val_batches=0)
    fn.fit(trainer, module)
    return found
