"""What would break on a GPU, tested without one: by fakes, mocks and counts.

Tests that need a GPU are in test_gpu.py.
"""

import os
from datetime import timedelta
from types import SimpleNamespace

import lightning
import pytest
import torch
import torch.distributed as dist
from helpers import make_config, randint, randn, user_error
from test_devices import Steps, fake_cuda, fake_images, pretraining  # noqa: F401
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import functions as fn
import rnn
import rnn_hyperparameter_tune as tune
import simCLR
from contrastive import augmentation, evaluation, memory, plan, probe
from contrastive.arithmetic import arithmetic
from machinery import checkpoints, devices, files, processes, run_folder, training

# ------------------------------------------------------------------------------------------------
# Which device, which precision
# ------------------------------------------------------------------------------------------------

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, architectures): this machine seems to have such a GPU."""

    def pretend(capability, architectures=WHEEL):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
        devices.note.cache_clear()

    return pretend


@pytest.mark.parametrize(
    ("capability", "architectures", "usable"),
    [
        ((7, 0), WHEEL, False),  # V100
        ((6, 1), WHEEL, False),  # GTX 10
        ((7, 5), WHEEL, True),  # T4
        ((8, 9), WHEEL, True),  # runs code of its own generation
        ((9, 0), ["sm_80", "compute_80"], True),  # compiled from PTX as it starts
        ((12, 1), WHEEL, True),
        ((8, 0), ["sm_86"], False),  # a later code of its generation
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_a_gpu_that_pytorch_has_no_kernels_for_is_not_taken(
    capability, architectures, usable, gpu, capsys
):
    gpu(capability, architectures)
    assert [devices.resolve_device("auto") for _ in range(2)] == ["cuda" if usable else "cpu"] * 2
    error = capsys.readouterr().err
    if usable:
        assert error == ""
        return
    (line,) = error.splitlines()  # once
    name = f"sm_{capability[0]}{capability[1]}"
    assert name in line
    assert "install a PyTorch build for an older CUDA" in line
    assert name in user_error(devices.resolve_device, "cuda")


def test_a_driver_whose_gpu_pytorch_does_not_find_is_named(monkeypatch, capsys):
    devices.note.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert devices.resolve_device("auto") == "cpu"
    assert "there is an NVIDIA driver, but PyTorch finds no GPU" in capsys.readouterr().err
    assert "update the driver" in user_error(devices.resolve_device, "cuda")


def test_bfloat16_is_refused_where_the_gpu_has_none(gpu):
    gpu((7, 5))
    assert devices.resolve_precision("auto", "cuda") == "fp32"
    assert devices.resolve_precision("fp16", "cuda") == "fp16"
    assert "take fp16 or fp32" in user_error(devices.resolve_precision, "bf16", "cuda")
    assert "--precision fp16" in user_error(devices.resolve_precision, "fp16", "cpu")
    gpu((8, 0))
    assert devices.resolve_precision("bf16", "cuda") == "bf16"


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("bf16", True), ("fp16", True)])
def test_float32_is_float32_on_a_gpu(precision, tf32, monkeypatch):
    """PyTorch's own default computes convolutions in TF32, of 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    before = torch.get_float32_matmul_precision()
    try:
        devices.prepare_device(devices.Machine("cuda", precision))
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_rows_prefer_the_cpu_to_apples_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert simCLR.Config(dataset="digits").machine.device == "mps"
    assert rnn.Config(dataset="digits").machine.device == "cpu"
    assert tune.Config(dataset="digits").machine.device == "cpu"
    assert rnn.Config(dataset="digits", accelerator="mps").machine.device == "mps"


@pytest.mark.parametrize(("seen", "expected"), [(None, "01230"), ("2,3", "23232")])
def test_workers_take_the_gpus_in_turn(seen, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for index, gpu in enumerate(expected):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if seen:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        devices.take_gpu(index)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu


def test_where_there_is_no_gpu_workers_take_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices.take_gpu(1)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_results_say_what_the_gpu_is(gpu, monkeypatch):
    gpu((9, 0))
    found = SimpleNamespace(name="a GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_000)
    monkeypatch.setattr(devices, "PEAKS", [0, 5, 3])
    for name, value in (("max_memory_allocated", 2**20), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    answer = SimpleNamespace(stdout="580.65.06\n580.65.06\n")
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: answer)
    record = devices.gpu_record()
    assert record["driver"] == "580.65.06"
    assert (record["name"], record["capability"], record["peak_mib"]) == ("a GPU", "9.0", 5)
    assert record["memory_mib"] == 80 * 1024
    assert {"cuda", "cudnn", "tf32"} < record.keys()


def test_images_stay_off_a_gpu_without_room_for_them(monkeypatch):
    batches = fn.Batches(torch.zeros(1000, 3, dtype=torch.uint8), batch_size=10)
    for free, fits in ((12_000, True), (11_999, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 99_000))
        assert batches.fits(torch.device("cuda")) == fits


def test_memory_that_runs_out_in_pretraining_names_the_micro_batches(monkeypatch, capsys):
    def main(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sys.argv", ["simCLR.py", "--dataset", "digits"])
    with pytest.raises(SystemExit):
        fn.command_line(main, simCLR.Config, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory: give --micro_batch_size" in line


# ------------------------------------------------------------------------------------------------
# What is computed, in what layout and precision
# ------------------------------------------------------------------------------------------------


class InWhat(Steps):
    """Notes whether autocast would reach the recurrent layer, and what it is given."""

    bidirectional = False

    def forward(self, x):
        self.seen = torch.is_autocast_enabled("cuda"), x.dtype
        return super().forward(x)


@pytest.mark.parametrize("reduced", [torch.bfloat16, torch.float16])
def test_recurrent_layers_stay_in_float32_on_a_gpu(reduced, fake_cuda):  # noqa: F811
    """Under autocast PyTorch would give cuDNN float16, whatever the precision."""
    model = rnn.SimpleRNN(96, 256, 1, 10, 64, 64)
    model.recurrent = InWhat(96, 256)
    fake_cuda(model)
    with fake_cuda.mode:
        rows = rnn.rows_as_sequence(fake_images(4).float())
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", reduced)
        try:
            logits = model(rows)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert model.recurrent.seen == (False, torch.float32)
    assert logits.dtype == reduced  # the head is not left out


def test_clipping_comes_after_float16s_scale_is_taken_off():
    """A fused step takes it off itself, when the gradient's norm is long known."""
    split = randint(256, 8, 3, 8, 8, dtype=torch.uint8), randint(3, 8)
    splits = rnn.Splits(split, split, split, ("a", "b", "c"))
    for clip, precision, fused in ((1.0, "fp16", False), (0.0, "fp16", True), (1.0, "bf16", True)):
        config = rnn.Config(batch_size=4, gradient_clip=clip, precision=precision)
        module = rnn.RowClassification(rnn.SimpleRNN(24, 8, 1, 3, 4, 4), splits, config)
        assert module.configure_optimizers()["optimizer"].defaults["fused"] == fused


def test_apples_gpus_get_maps_in_the_usual_layout(monkeypatch):
    module, seen = pretraining(), []
    monkeypatch.setattr(simCLR.Pretraining, "global_step", 0)
    monkeypatch.setattr(simCLR.SimCLRModel, "forward", lambda _, x: seen.append(x) or x)
    images = randint(256, 4, 3, 8, 8, dtype=torch.uint8)
    for device, last in (("cpu", True), ("mps", False)):
        with monkeypatch.context() as patch:
            patch.setattr(simCLR.Pretraining, "device", SimpleNamespace(type=device))
            module.embed(images)
        assert seen[-1].is_contiguous(memory_format=torch.channels_last) == last
        assert seen[-1].is_contiguous() != last


class Largest(TorchDispatchMode):
    """The most elements that any operator's result has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and "view" not in function.name():
            self.most = max(self.most, result.numel())
        return result


def test_blur_needs_no_copy_for_each_tap():
    """A kernel of 21 taps, for images of 224 pixels."""
    x = torch.rand(2, 3, 224, 224)
    with Largest() as largest:
        augmentation.gaussian_blur(x, 1.0)
    assert largest.most < 2 * x.numel()


@pytest.mark.parametrize("n", [1, 50])
def test_many_losses_are_looked_at_in_one_read(n):
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in function.name():
                reads.append(function)
            return function(*args, **kwargs or {})

    check = training.FiniteLoss()
    trainer = SimpleNamespace(global_step=n, num_training_batches=n, current_epoch=0)
    check.step_rate = 0.1
    check.unchecked = [(i, 0.1, torch.tensor(1.0)) for i in range(n - 1)]
    with Reads():
        check.on_train_batch_end(trainer, None, {"loss": torch.tensor(2.0)}, None, n - 1)
    assert len(reads) == 1
    assert check.unchecked == []


def test_the_first_loss_that_is_not_finite_is_named():
    check = training.FiniteLoss()
    trainer = SimpleNamespace(global_step=4, num_training_batches=4, current_epoch=0)
    check.step_rate = 0.4
    values = [1.0, torch.nan, torch.inf]
    check.unchecked = [(i, i / 10, torch.tensor(v)) for i, v in enumerate(values, 1)]
    with pytest.raises(fn.UserError, match=r"epoch 1, step 2, learning rate 0\.2;"):
        check.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)}, None, 3)


def test_knn_runs_where_the_encoder_ran(monkeypatch):
    seen = []

    def knn_predict(queries, bank, labels, *_):
        seen.extend(part.device.type for part in (queries, bank, labels))
        return torch.zeros(len(queries), dtype=torch.long)

    monkeypatch.setattr(fn, "knn_predict", knn_predict)
    machine = property(lambda self: devices.Machine("meta", "fp32"))
    monkeypatch.setattr(evaluation.EvaluationSettings, "machine", machine)
    features = probe.Features(randn(6, 4), randint(2, 6), randn(3, 4), randint(2, 3), ("a", "b"))
    probe.knn_accuracy(features, make_config(stages="knn", checkpoint="x"))
    assert seen == ["meta"] * 3


def calls_of(function):
    """How many operators a call makes."""
    count = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += 1
            return func(*args, **kwargs or {})

    with Count():
        function()
    return count


def test_the_number_of_launches_in_a_step_does_not_grow(fake_cuda):  # noqa: F811
    """With a small encoder a GPU waits for them. These are today's numbers: a cap, not a wish."""
    module = fake_cuda(pretraining())
    with fake_cuda.mode:
        images = fake_images()
        views = simCLR.random_views(images, module.config)
        augment = calls_of(lambda: simCLR.random_views(images, module.config))
        encode = calls_of(lambda: module.model(views))
    assert augment <= AUGMENT
    assert encode <= ENCODE


AUGMENT, ENCODE = 620, 420


# ------------------------------------------------------------------------------------------------
# Memory, told before it is spent
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduced", [None, torch.bfloat16])
@pytest.mark.parametrize(("stem", "norm"), [("cifar", "batch"), ("imagenet", "group")])
def test_what_a_step_keeps_is_what_a_real_one_keeps(stem, norm, reduced):
    encoder, dim = simCLR.build_encoder("resnet18", stem, norm)
    model = simCLR.SimCLRModel(encoder, dim, 64, 32, norm).train()
    parameters = list(model.parameters())
    views = torch.rand(6, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    kept = memory.Kept(parameters)
    with torch.autocast("cpu", reduced, enabled=reduced is not None), kept:
        model(views)
    weights = 3 * 4 * sum(p.numel() for p in parameters)
    expected = memory.bytes_of_a_step(model, 6, 16, "cpu", reduced) - weights
    assert kept.bytes == pytest.approx(expected, rel=0.01)
    assert kept.bytes > 10 * views.nbytes


def test_memory_grows_with_views_and_area_and_halves_in_bfloat16():
    model = simCLR.SimCLRModel(*simCLR.build_encoder("resnet18", "cifar"))
    weights = 3 * 4 * sum(p.numel() for p in model.parameters())
    small, twice, larger = (
        memory.bytes_of_a_step(model, views, side) - weights
        for views, side in ((64, 16), (128, 16), (64, 32))
    )
    half = memory.bytes_of_a_step(model, 64, 32, reduced=torch.bfloat16) - weights
    assert twice == pytest.approx(2 * small, rel=0.01)
    assert larger == pytest.approx(4 * small, rel=0.02)
    assert half == pytest.approx(larger / 2, rel=0.2)


@pytest.mark.parametrize(("free", "advice"), [(8, False), (1, True)])
def test_a_step_that_does_not_fit_is_told_before_it_is_tried(free, advice, monkeypatch, capsys):
    module = pretraining()
    monkeypatch.setattr(fn, "free_memory", lambda device: free * 2.0**30)
    monkeypatch.setattr(plan, "needed_bytes", lambda module: 3 * 2**30)
    monkeypatch.setattr(module.batches, "where", lambda device: "")
    machine = property(lambda self: devices.Machine("cuda", "bf16"))
    monkeypatch.setattr(simCLR.Config, "machine", machine)
    plan.print_plan(module, arithmetic(module))
    said = capsys.readouterr().out
    assert f"a step needs about 3.0 GiB of the {free}.0 GiB that are free" in said
    assert ("give --micro_batch_size" in said) == advice


def test_the_largest_step_is_the_one_that_is_told(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "bytes_of_a_step", lambda *a: asked.append(a[1:]) or 0)
    memory.needed_bytes(pretraining(crop_size="16:0.5,24:1"))
    memory.needed_bytes(pretraining(micro_batch_size=4))
    assert asked == [(16, 24, "cpu", torch.bfloat16), (8, 32, "cpu", torch.bfloat16)]


# ------------------------------------------------------------------------------------------------
# Processes and jobs
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def options(monkeypatch):
    """options(...) -> what make_trainer would give to Lightning's Trainer."""
    given = {}
    monkeypatch.setattr(lightning, "Trainer", lambda **options: given.update(options))
    monkeypatch.setattr(training, "end_with_parent", lambda: given.update(watched=True))

    def of(device="cpu", precision="fp32", **options):
        given.clear()
        machine = devices.Machine(device, precision)
        training.make_trainer(machine, 0, 1, fn.EpochLog(quiet=True), **options)
        return dict(given)

    yield of
    torch.set_float32_matmul_precision("highest")


JOB = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
JOB["SLURM_NTASKS_PER_NODE"] = "2"


@pytest.mark.slow
def test_a_checkpoint_of_somebody_elses_job_is_not_taken(run_here, monkeypatch, tmp_path):
    """Lightning looks for hpc_ckpt_N.ckpt in the current folder, in any job of SLURM."""
    flags = ["--dataset", "digits", "--epochs", 2, "--output_dir", "theirs"]
    assert run_here("rnn.py", *flags, cwd=tmp_path).returncode == 0
    os.rename(tmp_path / "theirs/checkpoints/last.ckpt", tmp_path / "hpc_ckpt_1.ckpt")
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    flags = ["--dataset", "digits", "--epochs", 3, "--output_dir", "ours"]
    done = run_here("rnn.py", *flags, cwd=tmp_path)
    assert done.returncode == 0
    assert "epoch 1/3" in done.stdout


def test_a_job_is_not_requeued(options, monkeypatch):
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    _, environment = options(devices=2)["plugins"]
    assert environment.auto_requeue is False
    _, alone = options(devices=1)["plugins"]
    assert type(alone).__name__ == "LightningEnvironment"


def test_several_gpus_keep_their_statistics_equal_by_themselves(options):
    given = options("cuda", "bf16", devices=2)
    assert given["sync_batchnorm"]
    assert given["precision"] == "bf16-mixed"
    assert list(given["strategy"]._ddp_kwargs.values()) == [False]  # its name depends on PyTorch
    assert given["strategy"]._timeout <= timedelta(minutes=10)
    given = options("cpu", "fp32", devices=2)
    assert not given["sync_batchnorm"]
    assert given["strategy"]._ddp_kwargs == {}
    assert options("cuda", "fp16")["precision"] == "16-mixed"


def test_the_others_watch_the_first_process(options, monkeypatch):
    monkeypatch.setattr(processes.rank_zero_only, "rank", 1)
    assert options(devices=2).get("watched")
    assert not options(devices=1).get("watched")
    monkeypatch.setattr(processes.rank_zero_only, "rank", 0)
    assert not options(devices=2).get("watched")


class Failing:
    """A trainer of the first of two processes, whose training ends in an error."""

    world_size, is_global_zero, interrupted = 2, True, False

    def __init__(self, error):
        self.error = error

    def fit(self, *_, **__):
        raise self.error


NCCL = "NCCL error in: Socket.cpp:67, remote process exited\nLast error: Call to connect failed"


def test_what_a_lost_connection_says_is_passed_on():
    message = user_error(fn.fit, Failing(dist.DistBackendError(NCCL)), nn.Linear(1, 1))
    assert (
        "another process of this training was lost or cannot be reached (NCCL error in" in message
    )
    assert "Last error" not in message
    assert "go on with --resume" in message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        dist.DistBackendError("NCCL error: Cuda failure 'out of memory'"),
        ValueError("of the program itself"),
    ],
)
def test_other_errors_are_not_taken_for_a_lost_process(error):
    with pytest.raises(type(error)):
        fn.fit(Failing(error), nn.Linear(1, 1))


def test_threads_are_those_of_before_once_a_training_of_several_is_over(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(training, "leave_or_wait", lambda: None)

    class Sharing(Failing):
        should_stop = False

        def fit(self, *_, **__):
            torch.set_num_threads(before + 1)

    fn.fit(Sharing(None), nn.Linear(1, 1))
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------------------------
# Files and compilers of other systems
# ------------------------------------------------------------------------------------------------


def test_a_file_that_somebody_reads_is_replaced_when_they_have_done(tmp_path, monkeypatch):
    """Windows refuses for as long as it is open."""
    replace, refusals = os.replace, iter([PermissionError(13, "in use")] * 2)

    def refusing(source, target):
        for error in refusals:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    files.write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_that_stays_in_use_is_one_line(tmp_path, monkeypatch):
    def refusing(source, target):
        raise PermissionError(13, "in use")

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    message = user_error(files.write_atomically, tmp_path / "a", b"new")
    assert "could not be written (in use)" in message
    assert list(tmp_path.iterdir()) == []


def test_compiling_without_triton_is_refused_before_work_begins(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(simCLR, "find_spec", lambda name: None)
    config = simCLR.Config(dataset="digits", compile=True)
    assert "--compile needs Triton" in user_error(simCLR.Optimisation.validate, config)


@pytest.mark.slow
def test_each_crop_size_and_micro_batch_has_its_graph(tmp_path, monkeypatch):
    """Eight graphs are PyTorch's limit; what comes later would run slowly, with a warning."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compile_ = simCLR.SimCLRModel.compile
    monkeypatch.setattr(
        simCLR.SimCLRModel, "compile", lambda self, **o: compile_(self, backend=counter, **o)
    )
    torch._dynamo.reset()
    images = randint(256, 15, 3, 8, 8, dtype=torch.uint8)
    data = fn.ImageDataset("x", images, None, None, None, ())
    schedule = "4:0.2,5:0.4,6:0.6,7:0.8,8:1"
    config = make_config(
        epochs=5,
        batch_size=15,
        micro_batch_size=8,
        compile=True,
        crop_size=schedule,
        norm="group",
        hidden_dim=8,
        embedding_dim=4,
    )
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = simCLR.SimCLRModel(encoder, 4, 8, 4, "group")
    simCLR.pretrain(model, data, config, tmp_path)
    assert counter.frame_count == 5 * 2 * 2  # crops, micro-batches of 8 and 7, with gradient or not


# ------------------------------------------------------------------------------------------------
# Where the mends are used
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_weights_lie_as_the_maps_do(device, monkeypatch, tmp_path):
    """A convolution whose weights lie channels last gives such maps, whatever it is given."""
    seen = []

    def pretrain(model, *_):
        seen.append(model.encoder.layer1[0].conv1.weight)
        raise fn.UserError("seen")

    monkeypatch.setattr(simCLR, "pretrain", pretrain)
    monkeypatch.setattr(simCLR, "show_views", lambda *_: None)
    machine = property(lambda self: devices.Machine(device, "fp32"))
    monkeypatch.setattr(simCLR.Config, "machine", machine)
    config = make_config(stages="pretrain", output_dir=str(tmp_path / "out"))
    assert user_error(simCLR.main, config) == "seen"
    last = device == "cpu"
    assert seen[0].is_contiguous(memory_format=torch.channels_last) == last
    assert seen[0].is_contiguous() != last


def test_a_set_without_room_on_a_device_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(fn.Batches, "fits", lambda *_: False)
    moved = fn.Batches(torch.zeros(20, 3), batch_size=10).to(torch.device("meta"))
    assert moved.tensors[0].device.type == "cpu"
    assert [batch.device.type for (batch,) in moved] == ["meta", "meta"]


def test_those_that_torchrun_started_wait_for_the_first_to_end(monkeypatch):
    """torchrun takes down a run whose processes do not all end within five minutes."""
    done = []

    def ended(status):
        done.append(f"ended {status}")
        raise SystemExit

    monkeypatch.setattr(processes.TorchElasticEnvironment, "detect", lambda: True)
    monkeypatch.setattr(dist, "new_group", lambda timeout, **_: timeout)
    monkeypatch.setattr(dist, "barrier", done.append)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("left"))
    monkeypatch.setattr(os, "_exit", ended)

    monkeypatch.setattr(processes.rank_zero_only, "rank", 1)
    with pytest.raises(SystemExit):
        processes.leave_or_wait()
    patient, end = done
    assert patient >= timedelta(days=1)
    assert end == "ended 0"

    done.clear()
    monkeypatch.setattr(processes.rank_zero_only, "rank", 0)
    processes.leave_or_wait()
    assert done == []  # it goes on, and evaluates
    processes.release()
    assert done == [patient, "left"]


def test_each_worker_of_a_study_is_given_a_gpu_first_of_all(monkeypatch):
    done = []

    class AtOnce:
        """A worker's process, which is over as soon as it is started."""

        exitcode = 0

        def __init__(self, target, args, daemon):
            self.start = lambda: target(*args)

        def is_alive(self):
            return False

        kill = join = is_alive

    context = SimpleNamespace(Process=AtOnce)
    monkeypatch.setattr(fn.trials.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(fn.trials, "end_with_parent", lambda: None)
    monkeypatch.setattr(fn, "take_gpu", lambda index: done.append(index))
    monkeypatch.setattr(tune, "work_quietly", lambda *_: done.append("work"))
    study = SimpleNamespace(get_trials=lambda deepcopy: [])
    assert fn.trials.run_workers(study, tune.work, (None, 1), print, 3) == []
    assert done == [0, "work", 1, "work", 2, "work"]


@pytest.fixture
def in_use(monkeypatch):
    """Each replacement of a file is refused once, as by Windows while somebody reads it."""
    replace, refused = os.replace, set()

    def refusing(*names):
        if names not in refused:
            refused.add(names)
            raise PermissionError(13, "in use")
        replace(*names)

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)


def test_a_checkpoint_that_somebody_reads_is_replaced_when_they_have_done(in_use, tmp_path):
    last = tmp_path / "last.ckpt"
    for value in (1, 2):
        checkpoints.SafeCheckpoints().save_checkpoint({"value": value}, last)
    assert checkpoints.load_checkpoint(last) == {"value": 2}
    assert checkpoints.load_checkpoint(checkpoints.previous(last)) == {"value": 1}


def test_earlier_results_that_somebody_reads_are_kept_when_they_have_done(in_use, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    fn.Run(make_config(resume=str(tmp_path))).prepare()
    assert (tmp_path / run_folder.EARLIER).read_text() == "{}"


def test_results_json_has_what_the_gpu_is(monkeypatch):
    machine = property(lambda self: devices.Machine("cuda", "bf16"))
    monkeypatch.setattr(simCLR.Config, "machine", machine)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(run_folder, "gpu_record", lambda: {"peak_mib": 5})
    assert fn.Run(make_config()).record()["gpu"] == {"peak_mib": 5}


def test_an_epochs_row_has_the_peak_of_the_gpus_memory(monkeypatch):
    peaks = iter([5 * 2**20, 3 * 2**20])  # since it was last set back
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("set back"))
    done = []
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    trainer = SimpleNamespace(world_size=1, current_epoch=0, loggers=[], strategy=strategy)
    trainer.check_val_every_n_epoch, trainer.callback_metrics = 1, {}
    trainer.optimizers = [torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)]
    log = fn.EpochLog(quiet=True)
    for _ in range(2):
        log.on_train_epoch_start(trainer, None)
        log.training_end += 1
        log.on_train_epoch_end(trainer, None)
    assert [row["peak_mib"] for row in log.rows] == [5, 3]
    assert done == ["set back"] * 2


def test_without_a_driver_there_is_no_version_of_it(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(devices.subprocess, "run", missing)
    assert devices.driver_version() is None


def test_the_gradient_by_row_is_taken_on_the_cpu_where_the_gpu_is_apples(monkeypatch):
    split = randint(256, 8, 3, 8, 8, dtype=torch.uint8), randint(3, 8)
    splits = rnn.Splits(split, split, split, ("a", "b", "c"))
    config = rnn.Config(batch_size=4)
    module = rnn.RowClassification(rnn.SimpleRNN(24, 8, 1, 3, 4, 4), splits, config)
    seen = []
    monkeypatch.setattr(module, "to", lambda device: seen.append(device) or module)
    shares = rnn.gradient_by_row(module, *split, devices.Machine("mps", "fp32"))
    assert seen == ["cpu"]
    assert sum(shares) == pytest.approx(1)


def test_checkpoints_come_as_the_flag_says(monkeypatch, tmp_path):
    seen = []

    class Seen(fn.Checkpoints):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            seen.append(self.every)
            raise fn.UserError("seen")

    monkeypatch.setattr(fn, "Checkpoints", Seen)
    images, labels = randint(256, 8, 3, 8, 8, dtype=torch.uint8), randint(3, 8)
    splits = rnn.Splits(*[(images, labels)] * 3, ("a", "b", "c"))
    config = rnn.Config(batch_size=4, checkpoint_every=7, accelerator="cpu")
    user_error(rnn.train, config, "rnn", splits, tmp_path)
    data = fn.ImageDataset("x", images, None, None, None, ())
    model = simCLR.SimCLRModel(nn.Flatten(), 192)
    user_error(simCLR.pretrain, model, data, make_config(checkpoint_every=7), tmp_path)
    assert seen == [7, 7]
