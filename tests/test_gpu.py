"""On a CUDA GPU: it computes what the CPU computes. Run by results/gpu.sh 1, or pytest -m gpu.

TEST_DEVICE=cpu runs the same on the CPU, which shows that the tests themselves run.
"""

import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from helpers import make_config, randint, randn
from test_gpus import InWhat

import functions as fn
import rnn
import simCLR

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"


@pytest.fixture(autouse=True)
def float32():
    """All in float32, as on the CPU."""
    fn.prepare_device(fn.Machine(DEVICE, "fp32"))
    torch.manual_seed(0)


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("n", [2, 100, 3000])
def test_nt_xent_and_its_gradient(n):
    here = randn(2 * n, 32, dtype=torch.float32).requires_grad_()
    there = here.detach().to(DEVICE).requires_grad_()
    losses = [fn.nt_xent_loss(z, 0.3) for z in (here, there)]
    for loss in losses:
        loss.backward()
    close(losses[1], losses[0])
    close(there.grad, here.grad)


def test_knn():
    bank, queries, labels = randn(900, 16), randn(100, 16), randint(10, 900)
    args = [part.float() for part in (queries, bank)]
    here = fn.knn_predict(*args, labels, 10, k=20)
    there = fn.knn_predict(*(part.to(DEVICE) for part in args), labels.to(DEVICE), 10, k=20)
    assert (here == there.cpu()).float().mean() > 0.98  # ties may fall either way


@pytest.fixture
def same_draws(monkeypatch):
    """What is drawn at random is drawn on the CPU, and so is the same on every device."""
    for name in ("rand", "randn", "randint", "randperm"):
        draw = getattr(torch, name)

        def on_cpu(*args, draw=draw, device=None, **options):
            return draw(*args, **options).to(device or "cpu")

        monkeypatch.setattr(torch, name, on_cpu)


@pytest.mark.parametrize("changes", [{}, {"blur": 1.0, "jitter_strength": 1.0}])
def test_augmentation(changes, same_draws):
    images, config = randint(256, 64, 3, 32, 32, dtype=torch.uint8), make_config(**changes)
    views = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(3)
        views.append(simCLR.random_views(images.to(device), config, 24).cpu())
    assert (views[0] - views[1]).abs().mean() < 1e-4  # a hue at a sector's edge may fall either way
    assert ((views[0] - views[1]).abs() > 1e-2).float().mean() < 1e-3


def step_of(device, norm="batch", compiled=False):
    """(loss, gradient) of one step on fixed views."""
    torch.manual_seed(0)
    model = simCLR.SimCLRModel(*simCLR.build_encoder("resnet18", "cifar", norm), norm=norm).to(
        device
    )
    if compiled:
        model.compile(dynamic=False)
    views = randn(32, 3, 16, 16, dtype=torch.float32).to(device)
    loss = fn.nt_xent_loss(model(views.contiguous(memory_format=torch.channels_last)), 0.5)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_gradient_of_a_step(norm):
    (here, ours), (there, theirs) = step_of("cpu", norm), step_of(DEVICE, norm)
    close(there, here, rtol=1e-3)
    assert (ours - theirs.cpu()).norm() / ours.norm() < 1e-2


@pytest.mark.skipif(not ON_GPU, reason="takes a minute on a CPU, and shows nothing there")
def test_compiled_is_eager():
    (eager, ours), (compiled, theirs) = step_of(DEVICE), step_of(DEVICE, compiled=True)
    close(compiled, eager, rtol=1e-3)
    assert (ours - theirs).norm() / ours.norm() < 1e-2


def trained(micro, precision="fp32"):
    """The weights after two epochs on digits, in GroupNorm, so that micro-batches do not matter."""
    values = {"epochs": 2, "batch_size": 64, "micro_batch_size": micro, "stem": "imagenet"}
    values |= {"norm": "group", "accelerator": DEVICE, "precision": precision, "hidden_dim": 32}
    values |= {"embedding_dim": 32}
    values |= {"crop_scale": 1.0, "flip": 0.0, "jitter": 0.0, "grayscale": 0.0}
    config = make_config(**values)
    torch.manual_seed(0)
    encoder, dim = simCLR.build_encoder("resnet18", "imagenet", "group")
    model = simCLR.SimCLRModel(encoder, dim, 32, 32, "group")
    images = fn.load_dataset("digits").train_images[:256]
    kind = simCLR.CachedPretraining if micro else simCLR.Pretraining
    log = fn.EpochLog(quiet=True)
    trainer = fn.make_trainer(config.machine, 0, 2, log, limit_val_batches=0)
    fn.fit(trainer, kind(model, images, None, config))
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    return weights, [row["train_loss"] for row in log.rows]


def test_micro_batches_train_as_the_whole_batch():
    (whole, losses), (parts, others) = trained(None), trained(24)
    assert losses == pytest.approx(others, rel=1e-3)
    assert (whole - parts).norm() / whole.norm() < 1e-3


def test_twenty_steps_never_wait_for_the_gpu():
    """No value is fetched, and nothing is copied in a way that waits."""
    config = make_config(batch_size=16, accelerator=DEVICE, precision="auto", blur=0.5)
    model = simCLR.SimCLRModel(*simCLR.build_encoder("resnet18", "cifar")).to(DEVICE)
    images = randint(256, 320, 3, 16, 16, dtype=torch.uint8)
    module = simCLR.Pretraining(model, images, None, config).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    batches = list(module.batches.to(torch.device(DEVICE)))
    torch.zeros(1, device=DEVICE).item()
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for (batch,) in batches:
            with config.machine.autocast():
                views = module.normalize(simCLR.random_views(batch, config))
                loss = fn.nt_xent_loss(model(views), 0.5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert len(batches) == 20
    assert loss.isfinite()


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_recurrent_layers_compute_in_float32(cell):
    torch.manual_seed(0)
    model = rnn.SimpleRNN(24, 16, 1, 3, 8, 8, cell).eval()
    rows = randn(4, 8, 24, dtype=torch.float32)
    expected = model.states(rows)
    moved = copy.deepcopy(model).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
        states = moved.states(rows.to(DEVICE))
    assert states.dtype == torch.float32
    close(states, expected)

    model.recurrent = InWhat(24, 16).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
        model.states(rows.to(DEVICE))
    assert model.recurrent.seen[1] == torch.float32


def test_a_set_that_stays_off_the_gpu_gives_the_same_batches(monkeypatch):
    images, labels = randint(256, 200, 3, 8, 8, dtype=torch.uint8), torch.arange(200)
    found = []
    for share in (1.0, 0.0):
        monkeypatch.setattr("machinery.batches.SHARE", share)
        batches = fn.Batches(images, labels, batch_size=32, seed=1).to(torch.device(DEVICE))
        assert batches.kept == bool(share)
        found.append([tuple(part.cpu() for part in batch) for batch in batches])
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one, other))


def test_sigterm_and_resume(tmp_path):
    flags = ["--dataset", "digits", "--accelerator", DEVICE, "--stages", "pretrain,knn"]
    flags += ["--epochs", "6", "--stem", "imagenet", "--checkpoint_every", "0", "--no-baselines"]
    command = [sys.executable, str(ROOT / "simCLR.py"), *flags, "--output_dir", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out/checkpoints/last.ckpt").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, error
    assert "interrupted; continue with" in error

    command = [sys.executable, str(ROOT / "simCLR.py"), "--resume", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "epoch 6/6" in done.stdout
