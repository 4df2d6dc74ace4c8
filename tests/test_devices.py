"""Several devices, and micro-batches, give what one device and a whole batch give."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from helpers import NARROW
from lightning.pytorch.callbacks import Callback
from processes import ROOT
from test_resume import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import functions as fn
import rnn
import simCLR
from contrastive.probe import Probe
from machinery import command_line

# Views that are the images themselves: devices and micro-batches draw different views, but must
# compute the same from the same ones.
PLAIN = ["--crop_scale", 1, "--flip", 0, "--jitter", 0, "--grayscale", 0]

ONE_STEP = [
    *["--dataset", "digits", "--stages", "pretrain,probe", "--baselines", "false"],
    *["--epochs", 1, "--probe_epochs", 1, "--stem", "imagenet", "--norm", "group"],
    *["--accelerator", "cpu", "--precision", "fp32", "--hidden_dim", 64, "--embedding_dim", 32],
]


def gradient(folder):
    """The gradient of the first step, flat: what SGD's momentum holds after it."""
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    state = checkpoint["optimizer_states"][0]["state"]
    return torch.cat([state[i]["momentum_buffer"].flatten() for i in sorted(state)])


def loss(folder):
    return float(next(csv.DictReader((folder / "metrics.csv").open()))["train_loss"])


@pytest.fixture(scope="module")
def whole_batch(prepare, tmp_path_factory):
    """One step of 720 images on one device."""
    folder = tmp_path_factory.mktemp("whole")
    flags = [*ONE_STEP, *PLAIN, "--batch_size", 720, "--output_dir", "out"]
    prepare("simCLR.py", *flags, cwd=folder)
    return folder / "out"


@pytest.mark.skipif(os.cpu_count() < 2, reason="needs two cores")
@pytest.mark.slow
@pytest.mark.parametrize("micro", [[], ["--micro_batch_size", 100]])
def test_two_processes_are_one_with_twice_the_batch(micro, whole_batch, run, tmp_path):
    """They have the same loss and the same gradient of all parameters.

    Negatives come from both processes, and DDP's mean is the whole batch's gradient.
    """
    flags = [*ONE_STEP, *PLAIN, "--batch_size", 360, "--devices", 2, *micro, "--output_dir", "out"]
    done = run("simCLR.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""

    assert "batch 720 = 360 x 2 devices" in done.stdout
    assert "(1,438 negatives per view)" in done.stdout
    assert "learning rate 0.06 x 720/256" in done.stdout
    assert "linear probe: train" in done.stdout
    assert done.stdout.count("epoch 1/1") == 1, "the first process alone prints"

    assert loss(tmp_path / "out") == pytest.approx(loss(whole_batch), rel=1e-6)
    ours, whole = gradient(tmp_path / "out"), gradient(whole_batch)
    assert float((ours - whole).norm() / whole.norm()) < 1e-5

    first, second = ({p.name for p in f.iterdir()} for f in (tmp_path / "out", whole_batch))
    events = list((tmp_path / "out").rglob("events.out.tfevents*"))
    assert first == second
    assert len(events) == 1, "the first process alone writes"


@pytest.mark.skipif(os.cpu_count() < 2, reason="needs two cores")
@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--positives", "mean"],
        ["--decoupled", "true"],
        ["--micro_batch_size", 50],
        ["--precision", "bf16"],
        ["--optimizer", "muon", "--learning_rate", 0.03],
    ],
    ids=lambda flags: "-".join(map(str, flags)).strip("-") or "each",
)
def test_two_processes_are_one_with_four_views_too(more, run, run_here, tmp_path):
    """Each process has its images' views; together they are, view by view, the whole batch's."""
    flags = [*ONE_STEP, *PLAIN, "--views", 4, "--stages", "pretrain", "--seed", 1, *more]
    for name, devices in (("one", 1), ("two", 2)):
        batch = ["--batch_size", 720 // devices, "--devices", devices]
        micro = [] if devices == 2 else ["--micro_batch_size", 720]
        flags_here = [*flags, *batch, *(micro if "--micro_batch_size" in more else [])]
        runs = run_here if name == "one" else run
        done = runs("simCLR.py", *flags_here, "--output_dir", name, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "x 4 views (2,876 negatives per view)" in done.stdout

    close = 1e-2 if "bf16" in more else 1e-5
    whole, ours = gradient(tmp_path / "one"), gradient(tmp_path / "two")
    assert loss(tmp_path / "two") == pytest.approx(loss(tmp_path / "one"), rel=close)
    assert float((ours - whole).norm() / whole.norm()) < (0.1 if "bf16" in more else 1e-5)
    whole, ours = (
        torch.load(tmp_path / name / "encoder.pt", weights_only=True) for name in ("one", "two")
    )
    for name, weight in whole.items():  # as their optimizer has moved them
        assert torch.allclose(ours[name], weight, atol=0.01 if "bf16" in more else 1e-4), name


@pytest.mark.skipif(os.cpu_count() < 2, reason="needs two cores")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent_class", "tau", "mc_infonce", "kappa"])
def test_two_processes_are_one_with_losses_that_learn_certainty(kind, run, run_here, tmp_path):
    """Also what stands beside the embedding is gathered. Samples are drawn by each process."""
    flags = [*ONE_STEP, *PLAIN, "--loss", kind, "--stages", "pretrain", "--seed", 1]
    for name, devices in (("one", 1), ("two", 2)):
        batch = ["--batch_size", 720 // devices, "--devices", devices]
        runs = run_here if name == "one" else run
        done = runs("simCLR.py", *flags, *batch, "--output_dir", name, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")

    drawn = kind == "mc_infonce"
    whole, ours = gradient(tmp_path / "one"), gradient(tmp_path / "two")
    assert loss(tmp_path / "two") == pytest.approx(
        loss(tmp_path / "one"), rel=1e-2 if drawn else 1e-5
    )
    assert float((ours - whole).norm() / whole.norm()) < (0.3 if drawn else 1e-5)


def torchrun(nodes, port, flags, cwd):
    """Start `torchrun` for one of the nodes, with one process; all nodes are this machine."""
    words = ["--nnodes", nodes, "--nproc_per_node", 1]
    words += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *words, ROOT / "simCLR.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=cwd, **pipes)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() < 2, reason="needs two cores")
def test_two_nodes_started_by_torchrun_are_one_with_twice_the_batch(whole_batch, tmp_path):
    flags = [*ONE_STEP, *PLAIN, "--batch_size", 360, "--num_nodes", 2, "--output_dir", "out"]
    port = free_port()
    nodes = [torchrun(2, port, flags, tmp_path) for _ in range(2)]
    texts = [node.communicate(timeout=120) for node in nodes]

    assert [node.returncode for node in nodes] == [0, 0], texts
    # The second waits for what the first does alone: torchrun's agents expect a common end.
    assert "results in" in "".join(out for out, _ in texts)
    assert sum("epoch 1/1" in out for out, _ in texts) == 1
    assert "batch 720 = 360 x 1 devices x 2 nodes" in "".join(out for out, _ in texts)
    assert loss(tmp_path / "out") == pytest.approx(loss(whole_batch), rel=1e-6)

    ours, whole = gradient(tmp_path / "out"), gradient(whole_batch)
    assert float((ours - whole).norm() / whole.norm()) < 1e-5


@pytest.mark.parametrize(
    ("started", "flags", "named"),
    [
        (2, ["--devices", "2"], "--output_dir must be given"),
        (4, ["--devices", "2", "--output_dir", "x"], "4 were started"),
        (1, ["--num_nodes", "2", "--output_dir", "x"], "1 were started: use torchrun"),
    ],
)
def test_processes_started_together_must_agree(started, flags, named, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": started, "GROUP_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with pytest.raises(fn.UserError, match=named):
        fn.parse_config(simCLR.Config, ["--dataset", "digits", "--accelerator", "cpu", *flags])


def test_nodes_are_not_started_by_hand(tmp_path, monkeypatch):
    flags = ["--dataset", "digits", "--num_nodes", "2", "--output_dir", str(tmp_path / "x")]
    with pytest.raises(fn.UserError, match="start them with torchrun or srun"):
        fn.parse_config(simCLR.Config, flags)


@pytest.mark.parametrize("script", ["rnn.py", "simCLR.py"])
def test_one_device_is_a_run_of_its_own_however_it_was_started(
    script, run_here, monkeypatch, tmp_path
):
    """As the second task of srun, for example, it does and writes all that it would alone."""
    task = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_NAME": "x", "RANK": "1"}
    for name, value in task.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command_line.rank_zero_only, "rank", 1)

    flags = ["--dataset", "digits", "--epochs", 1, "--output_dir", "out"]
    if script == "simCLR.py":
        flags += ["--stages", "pretrain", *NARROW]
    done = run_here(script, *flags, cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 1/1" in done.stdout
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))


def runs(pid):
    """Whether a process is alive, and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


TWO = [
    *["--dataset", "digits", "--stages", "pretrain", "--epochs", 12, *NARROW],
    *["--accelerator", "cpu", "--precision", "fp32", "--batch_size", 128, "--devices", 2],
    *["--checkpoint_every", 0, "--output_dir", "out"],
]


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """Twelve epochs on two devices."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run("simCLR.py", *TWO, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "out"


def start_two(cwd, program=ROOT / "simCLR.py", flags=TWO, wait_for="epoch  2/12"):
    """Start a training of two processes. Returns the first, and the second's number."""
    command = [sys.executable, str(program), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = {"start_new_session": True, **pipes}
    first = subprocess.Popen(command, cwd=cwd, **options)
    for line in first.stdout:
        if line.startswith(wait_for):
            break

    second = None
    while second is None and first.poll() is None:
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        ours = [pid for pid, words in commands.items() if Path(program).name in words]
        second = next(iter(ours), None)
        time.sleep(0.1)
    return first, second


def wait_for_end(first, second, seconds):
    """Wait until both are gone, for so many seconds at most. Returns the first one's stderr."""
    begin = time.monotonic()
    try:
        _, error = first.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(first.pid, signal.SIGKILL)
        pytest.fail("the first process goes on alone")
    while runs(second):
        if time.monotonic() - begin > seconds:
            os.kill(second, signal.SIGKILL)
            pytest.fail("the second process goes on alone")
        time.sleep(0.1)
    return error


two_cores = pytest.mark.skipif(os.cpu_count() < 2, reason="needs two cores")
VICTIMS = {"first": [0], "second": [1], "both": [0, 1]}


@pytest.mark.slow
@two_cores
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_the_end_of_a_process_ends_the_run_which_goes_on_later(
    how, victim, undisturbed, run, tmp_path
):
    """It ends within 15 seconds, whichever of the two was ended, by force or by request.

    Once resumed, it ends with the same bits as an undisturbed run.
    """
    first, second = start_two(tmp_path)  # the first epoch's checkpoint is certainly there
    for i in VICTIMS[victim]:
        os.kill((first.pid, second)[i], how)
    error = wait_for_end(first, second, 15)

    if how == signal.SIGTERM and victim != "second":
        assert first.returncode == 130
        assert error.splitlines()[-1].startswith("simCLR.py: interrupted; continue with: python")
    elif victim == "second" and first.returncode > 0:  # else Lightning noticed, and killed it
        assert first.returncode == 2
        message = "simCLR.py: error: another process of this training was lost"
        assert error.splitlines()[-1].startswith(message)

    resumed = run("simCLR.py", "--resume", "out", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch  1/12" not in resumed.stdout
    assert "epoch 12/12" in resumed.stdout
    assert_same_bits(tmp_path / "out", undisturbed)


PATCHED = """
import os, sys, time
sys.path.insert(0, {root!r})
import torch, functions as fn, simCLR

def patched_step(self, batch, batch_idx):
    if self.global_step == 3 and self.global_rank == 1:
        {second}
    return step(self, batch, batch_idx)

step, simCLR.Pretraining.training_step = simCLR.Pretraining.training_step, patched_step
{more}
fn.command_line(simCLR.main, simCLR.Config, simCLR.__doc__)
"""
# What Lightning registers under NCCL alone, where the group waits for the others as it is closed.
STUCK = "import atexit; atexit.register(time.sleep, 600)"


@pytest.mark.slow
@two_cores
@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("raise ValueError('of the program')", "ValueError: of the program"),
        ("raise torch.OutOfMemoryError('CUDA out of memory')", "process 1 ran out of memory"),
    ],
)
def test_an_error_of_one_process_ends_all_even_where_their_group_does_not_close(
    second, said, tmp_path
):
    """As under NCCL, whose group waits for the others as it is closed."""
    program = tmp_path / "patched.py"
    program.write_text(PATCHED.format(root=str(ROOT), second=second, more=STUCK))
    first, other = start_two(tmp_path, program, wait_for="sgd")
    error = wait_for_end(first, other, 40)  # it starts, trains three steps, and ends
    assert first.returncode != 0
    assert said in error


@pytest.mark.slow
@two_cores
def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    """Also while it computes something that no other process waits for."""
    program = tmp_path / "patched.py"
    program.write_text(PATCHED.format(root=str(ROOT), second="time.sleep(600)", more=""))
    first, second = start_two(tmp_path, program, wait_for="sgd")
    time.sleep(15)  # by now it sleeps
    assert runs(second)
    os.kill(first.pid, signal.SIGKILL)
    wait_for_end(first, second, 15)


# ------------------------------------------------------------------------------------------------
# Gradient caching
# ------------------------------------------------------------------------------------------------


class Gradient(Callback):
    """Keeps the gradient that the optimizer gets.

    With `eval_norm`, BatchNorm uses its running statistics.
    """

    def __init__(self, eval_norm=False):
        self.eval_norm = eval_norm

    def on_train_batch_start(self, trainer, pl_module, *_):
        if self.eval_norm:
            pl_module.eval()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradient = torch.cat([p.grad.flatten().clone() for p in pl_module.model.parameters()])


def one_step(norm, micro, n=48, eval_norm=False, plain=True, **changes):
    """(model after one step on n digits, its gradient, its loss)."""
    values = {"dataset": "digits", "accelerator": "cpu", "precision": "fp32", "epochs": 1}
    values |= {"stem": "imagenet", "norm": norm, "hidden_dim": 64, "embedding_dim": 32}
    values |= {"batch_size": n, "micro_batch_size": micro}
    if plain:
        values |= {"crop_scale": 1.0, "flip": 0.0, "jitter": 0.0, "grayscale": 0.0}
    config = simCLR.Config(**values | changes)

    torch.manual_seed(0)
    encoder, dim = simCLR.build_encoder("resnet18", "imagenet", norm)
    model = simCLR.SimCLRModel(encoder, dim, config.hidden_dim, config.embedding_dim, norm).double()
    model.register_forward_pre_hook(lambda _, args: (args[0].double(),))

    images = fn.load_dataset("digits").train_images[:n]
    kept, log = Gradient(eval_norm), fn.EpochLog(quiet=True)
    trainer = fn.make_trainer(config.machine, config.seed, 1, log, [kept], limit_val_batches=0)
    kind = simCLR.CachedPretraining if micro else simCLR.Pretraining
    fn.fit(trainer, kind(model, images, None, config))
    return model, kept.gradient, log.rows[0]["train_loss"]


@pytest.mark.parametrize("micro", [2, 7, 16, 48])
@pytest.mark.parametrize(("norm", "eval_norm"), [("group", False), ("batch", True)])
def test_micro_batches_give_the_gradient_of_the_whole_batch(norm, eval_norm, micro):
    """Gao et al. 2021: the same loss and gradient, to float64's rounding, for any micro-batch."""
    _, whole, loss = one_step(norm, None, eval_norm=eval_norm)
    _, ours, our_loss = one_step(norm, micro, eval_norm=eval_norm)
    assert our_loss == pytest.approx(loss, rel=1e-12)
    assert float((ours - whole).norm() / whole.norm()) < 1e-11


@pytest.mark.parametrize("changes", [{"views": 3}, {"views": 3, "positives": "mean"}])
@pytest.mark.parametrize("decoupled", [False, True])
def test_micro_batches_of_more_views_do_too(changes, decoupled):
    changes |= {"decoupled": decoupled}
    _, whole, loss = one_step("group", None, **changes)
    _, ours, our_loss = one_step("group", 20, **changes)
    assert our_loss == pytest.approx(loss, rel=1e-12)
    assert float((ours - whole).norm() / whole.norm()) < 1e-11


def test_accumulating_gradients_would_not_do():
    """What the cache is for: parts of a batch have fewer negatives, and another gradient."""
    _, whole, _ = one_step("group", None)
    parts = [one_step("group", None, n=24)[1]]
    assert float((parts[0] - whole).norm() / whole.norm()) > 0.1


def test_both_passes_see_the_same_views(monkeypatch):
    seen, random_views = [], simCLR.random_views
    monkeypatch.setattr(
        simCLR, "random_views", lambda *a: seen.append(random_views(*a)) or seen[-1]
    )
    one_step("batch", 16, plain=False)
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[0], seen[1])


def test_batchnorm_counts_each_micro_batch_once(monkeypatch):
    """The first pass normalises by its batch, but only the second updates running statistics:

    m <- 0.9 m + 0.1 mean.
    """
    seen, random_views = [], simCLR.random_views
    monkeypatch.setattr(
        simCLR, "random_views", lambda *a: seen.append(random_views(*a)) or seen[-1]
    )
    model, _, _ = one_step("batch", 16, plain=False, learning_rate=1e-30)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]

    assert all(int(m.num_batches_tracked) == 3 and m.track_running_stats for m in norms)
    normalize = fn.Normalize(fn.load_dataset("digits").train_images[:48])
    mean = torch.zeros(64, dtype=torch.float64)
    for views in seen[3:]:
        mean = 0.9 * mean + 0.1 * model.encoder.conv1(normalize(views).double()).mean((0, 2, 3))
    torch.testing.assert_close(model.encoder.bn1.running_mean, mean)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the elements that autograd keeps for the backward pass, now and at the most."""

    class Holder:
        def __init__(self, tensor):
            self.tensor = tensor

    def __init__(self):
        super().__init__(self.pack, lambda holder: holder.tensor)
        self.now = self.most = 0

    def pack(self, tensor):
        holder = self.Holder(tensor)
        self.now += tensor.numel()
        self.most = max(self.most, self.now)
        weakref.finalize(holder, self.drop, tensor.numel())
        return holder

    def drop(self, elements):
        self.now -= elements


@pytest.mark.slow
def test_memory_follows_the_micro_batch():
    """Eight times the batch in micro-batches of the same size needs no more memory.

    As one whole batch it needs many times as much.
    """
    most = []
    for n, micro in ((64, 32), (512, 32), (512, None)):
        kept = Kept()
        with kept:
            one_step("batch", micro, n=n, embedding_dim=8)
        most.append(kept.most)
    assert most[1] < 1.02 * most[0]
    assert most[2] > 2 * most[1]


# ------------------------------------------------------------------------------------------------
# Device mix-ups fail even without a GPU: fake CUDA tensors have a shape and a device, but no values
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_cuda(monkeypatch):
    """fake_cuda(module) moves its parameters and buffers to a fake GPU, where the test runs."""
    monkeypatch.setattr(simCLR.Pretraining, "global_step", 0)
    monkeypatch.setattr(simCLR.Pretraining, "all_gather", lambda self, z, sync_grads: z)
    mode = FakeTensorMode()

    def fake(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    def move(module):
        with mode:
            for part in module.modules():
                for name, parameter in list(part.named_parameters(recurse=False)):
                    setattr(part, name, torch.nn.Parameter(fake(parameter)))
                for name, buffer in list(part.named_buffers(recurse=False)):
                    setattr(part, name, fake(buffer))
        return module

    move.mode = mode
    return move


def pretraining(**changes):
    config = simCLR.Config(batch_size=8, precision="bf16", accelerator="cpu", **changes)
    encoder = simCLR.build_encoder("resnet18", config.stem, config.norm)
    model = simCLR.SimCLRModel(*encoder, norm=config.norm)
    return simCLR.Pretraining(model, torch.zeros(8, 3, 32, 32, dtype=torch.uint8), None, config)


def fake_images(n=8):
    return torch.zeros(n, 3, 32, 32, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize(
    "changes", [{}, {"blur": 0.5, "stem": "imagenet"}, {"norm": "group", "crop_size": 16}]
)
def test_pretraining_stays_on_the_gpu(fake_cuda, changes):
    """Augment, normalise, encode, project, NT-Xent."""
    module = fake_cuda(pretraining(**changes))
    with fake_cuda.mode:
        loss = module.training_step((fake_images(),), 1)["loss"]
    assert (loss.device.type, loss.shape, loss.dtype) == ("cuda", (), torch.float32)


def test_evaluation_stays_on_the_gpu(fake_cuda):
    """k-NN on what the encoder makes of images, and a step of the linear probe."""
    module, classifier = fake_cuda(pretraining()), fake_cuda(torch.nn.Linear(512, 10))
    with fake_cuda.mode:
        h = module.model.get_encoder()(module.normalize(fake_images(20)))
        labels = torch.zeros(20, dtype=torch.long, device="cuda")
        predicted = fn.knn_predict(h[:5], h[5:], labels[5:], 10, k=3)
        batches = fn.Batches(h, labels, batch_size=4, seed=0)
        probe = Probe(classifier, batches, batches, simCLR.Config())
        outcome = probe.training_step(next(iter(batches)), 0)

    assert (predicted.device.type, predicted.shape) == ("cuda", (5,))
    assert {value.device.type for value in outcome.values()} == {"cuda"}


class Steps(torch.nn.Linear):
    """Replaces the recurrent layer, for which PyTorch asks the driver even with fake tensors."""

    def forward(self, x):
        return super().forward(x), None


def test_rows_stay_on_the_gpu(fake_cuda):
    split = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.long)
    splits = rnn.Splits(split, split, split, tuple("abcdefghij"))
    model = rnn.SimpleRNN(96, 256, 1, 10, 64, 64, pooling="attention")
    model.recurrent = Steps(96, 256)
    config = rnn.Config(batch_size=4, crop_padding=4, flip=True, label_smoothing=0.1)
    module = fake_cuda(rnn.RowClassification(model, splits, config))
    with fake_cuda.mode:
        labels = torch.zeros(4, dtype=torch.long, device="cuda")
        loss = module.training_step((fake_images(4), labels), 0)["loss"]
    assert (loss.device.type, loss.shape) == ("cuda", ())


def test_a_mix_of_devices_would_be_noticed(fake_cuda):
    """These tests can fail: statistics left on the CPU are an error."""
    module = fake_cuda(pretraining())
    with fake_cuda.mode:
        module.normalize.std = torch.ones(3, 1, 1)
        with pytest.raises(RuntimeError, match="device"):
            module.training_step((fake_images(),), 1)
