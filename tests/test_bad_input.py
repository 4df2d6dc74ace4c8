"""Bad input: one line that names culprit and remedy, exit status 2, and every file as it was."""

import contextlib
import json
import os
import string

import numpy as np
import pytest
import torch
import yaml
from conftest import Code
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import functions as fn
import rnn
import rnn_hyperparameter_tune as tune
import simCLR
from machinery import command_line

DIGITS_DATA = json.dumps(fn.load_dataset("digits").description(), indent=2) + "\n"


def png(file, color="red", size=(8, 8)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)


def make_bad_folders(root):
    """Image folders with one thing wrong each."""
    (root / "empty").mkdir()
    (root / "hidden").mkdir()
    (root / "hidden/.DS_Store").write_text("")
    (root / "afile").write_text("not a folder")
    for name in "abcdef":
        for c in "xy":
            for case in ("broken", "zero", "cut", "huge", "float", "few", "newclass"):
                png(root / case / "train" / c / f"{name}.png")
                png(root / case / "test" / c / f"{name}.png")
        for split in ("train", "test"):
            png(root / "oneclass" / split / "only" / f"{name}.png")
        png(root / "newclass/test/z" / f"{name}.png")
    (root / "broken/train/x/text.png").write_text("no image")
    (root / "zero/test/y/nothing.png").write_bytes(b"")
    whole = (root / "cut/train/x/a.png").read_bytes()
    (root / "cut/train/x/cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (16000, 16000)).save(root / "huge/train/x/huge.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(root / "float/train/y/float.tiff")
    for c in "xy":
        png(root / "notest/train" / c / "1.png")
    (root / "noimages/train").mkdir(parents=True)
    (root / "full").mkdir()
    (root / "full/notes.txt").write_text("mine")


def make_bad_files(root):
    """Configurations and checkpoints with one thing wrong each."""
    files = {
        "unknown.yaml": "epochs: 3\nbatchsize: 4\n",
        "damaged.yaml": "epochs: [",
        "code.yaml": "seed: !!python/object/apply:os.system ['touch hacked']",
        "list.yaml": "- epochs\n- 3\n",
        "word.yaml": "epochs",
        "nothing.yaml": "",
        "nested.yaml": "epochs: {a: 1}\n",
        "type.yaml": "epochs: many\n",
        "null.yaml": "epochs: null\n",
        "range.yaml": "epochs: -5\n",
        "tab.yaml": "epochs:\t3\n\tseed: 1\n",
        "date.yaml": "seed: 2020-01-01\n",
        "text.pt": "no checkpoint",
        "nothing.pt": "",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    (root / "binary.yaml").write_bytes(bytes(range(256)))
    torch.save(simCLR.build_encoder("resnet18", "imagenet")[0].state_dict(), root / "imagenet.pt")
    torch.save(Code(), root / "code.pt")
    torch.save([1, 2], root / "list.pt")
    torch.save({"state_dict": {"model.recurrent.weight": torch.zeros(2)}}, root / "rnn.ckpt")


def make_bad_runs(root):
    """Run folders with one thing wrong each."""
    for name in ("other", "nocheckpoint", "codecheckpoint", "badconfig", "codeconfig", "ends"):
        (root / name / "checkpoints").mkdir(parents=True)
        (root / name / "data.json").write_text(DIGITS_DATA)
        fn.save_config(root / name / "config.yaml", rnn.Config(dataset="digits", epochs=3))
    fn.save_config(root / "other/config.yaml", simCLR.Config(dataset="digits"))
    torch.save(Code(), root / "codecheckpoint/checkpoints/last.ckpt")
    (root / "headless").mkdir()
    (root / "headless/encoder.pt").touch()
    (root / "badconfig/config.yaml").write_text("epochs: [")
    code = "seed: !!python/object/apply:os.system ['touch hacked']"
    (root / "codeconfig/config.yaml").write_text(code)

    (root / "cycle").mkdir()
    cycle_config = rnn.Config(dataset="digits", epochs=3, schedule="one_cycle")
    fn.save_config(root / "cycle/config.yaml", cycle_config)

    (root / "study").mkdir()
    (root / "study/data.json").write_text(DIGITS_DATA)
    tune_config = tune.Config(dataset="digits", epochs=3)
    fn.save_config(root / "study/config.yaml", tune_config)
    (root / "study/study.db").write_bytes(b"no database" * 100)


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    make_bad_folders(root)
    make_bad_files(root)
    make_bad_runs(root)
    return root


DIGITS = ["--dataset", "digits"]
LATER = [*DIGITS, "--checkpoint", "text.pt", "--stages"]
OTHER_SET = ["--evaluate_on", "digits"]
KNN = [*DIGITS, "--stages", "knn", "--checkpoint"]
Z = ["--probe_layer", "1"]
FEW = ["--label_fraction", "0.1"]
SIMCLR, RNN, TUNE = "simCLR.py", "rnn.py", "rnn_hyperparameter_tune.py"

ALMOST_ALL = "--validation_fraction 0.999"
A_TENTH = "--train_fraction 0.1"
A_FILE = "--data_dir afile"
ALL_WARM_UP = "--warmup_epochs 9 --epochs 9 --schedule one_cycle"
TWO_DEVICES = "--batch_size 1000 --devices 2"
OTHERS = "--resume ends --seed 4 --cell gru"

# Each row: script, flags, the culprit that the line must name, the remedy that it must give.
BAD = [
    (SIMCLR, [*DIGITS, "--epochs", "0"], "--epochs", "at least 1"),
    (SIMCLR, [*DIGITS, "--epochs", "many"], "--epochs", "int"),
    (SIMCLR, [*DIGITS, "--epochs", "1.5"], "--epochs", "int"),
    (SIMCLR, [*DIGITS, "--batch_size", "1"], "--batch_size", "at least 2"),
    (SIMCLR, [*DIGITS, "--temperature", "0"], "--temperature", "positive"),
    (SIMCLR, [*DIGITS, "--temperature", "-1"], "--temperature", "positive"),
    (SIMCLR, [*DIGITS, "--temperature", ".nan"], "--temperature", "positive"),
    (SIMCLR, [*DIGITS, "--temperature", "hot"], "--temperature", "float"),
    (SIMCLR, [*DIGITS, "--learning_rate", ".inf"], "--learning_rate", "positive"),
    (SIMCLR, [*DIGITS, "--weight_decay", "-1"], "--weight_decay", "0 or more"),
    (SIMCLR, [*DIGITS, "--warmup_epochs", "-1"], "--warmup_epochs", "0 or more"),
    (SIMCLR, [*DIGITS, "--knn_every", "0"], "--knn_every", "at least 1"),
    (SIMCLR, [*DIGITS, "--crop_size", "3"], "--crop_size", "from 4 to 224"),
    (SIMCLR, [*DIGITS, "--crop_size", "16:0.5"], "--crop_size", "grow to 1"),
    (SIMCLR, [*DIGITS, "--crop_size", "16:0.7,24:0.6,32:1"], "--crop_size", "grow to 1"),
    (SIMCLR, [*DIGITS, "--crop_scale", "0"], "--crop_scale", "at most 1"),
    (SIMCLR, [*DIGITS, "--crop_scale", "1.5"], "--crop_scale", "at most 1"),
    (SIMCLR, [*DIGITS, "--flip", "2"], "--flip", "from 0 to 1"),
    (SIMCLR, [*DIGITS, "--grayscale", "-0.1"], "--grayscale", "from 0 to 1"),
    (SIMCLR, [*DIGITS, "--jitter_strength", "9"], "--jitter_strength", "from 0 to 1.25"),
    (SIMCLR, [*DIGITS, "--label_fraction", "0"], "--label_fraction", "at most 1"),
    (SIMCLR, [*DIGITS, "--label_fractions", "0.1,2"], "--label_fractions", "at most 1"),
    (SIMCLR, [*DIGITS, "--label_fractions", "0.001"], "--label_fractions", "take at least 0.007"),
    (SIMCLR, [*DIGITS, *FEW, "--label_fractions", "0.03"], "--label_fractions", "at least 0.07"),
    (SIMCLR, [*DIGITS, "--stages", "finetune"], "--stages finetune", "--checkpoint"),
    (SIMCLR, [*DIGITS, "--stages", "features"], "--stages features", "--checkpoint"),
    (SIMCLR, [*DIGITS, "--stages", "pretrain,gaze"], "'gaze'", "look,explore,certainty,features"),
    (SIMCLR, [*DIGITS, "--finetune_steps", "0"], "--finetune_steps", "at least 1"),
    (SIMCLR, [*DIGITS, "--finetune_head", "deep"], "--finetune_head", "mlp"),
    (SIMCLR, [*DIGITS, "--evaluate_on", "nowhere"], "--evaluate_on nowhere", "no such folder"),
    (SIMCLR, [*LATER, "finetune", "--probe_layer", "1"], "--probe_layer", "finetune"),
    (SIMCLR, [*LATER, "certainty", "--ten_crops"], "--ten_crops", "certainty"),
    (SIMCLR, [*LATER, "probe", "--ten_crops", "--probe_mirror"], "--probe_mirror", "leave one"),
    (SIMCLR, [*LATER, "probe", "--ten_crops", "--probe_cells", "2"], "--probe_cells", "leave one"),
    (SIMCLR, [*LATER, "knn", *OTHER_SET, "--recalibrate"], "--recalibrate", "--evaluate_on"),
    (SIMCLR, [*LATER, "knn", "--devices", "2"], "--devices", "pretrain"),
    (SIMCLR, [*DIGITS, "--evaluate_on", "noimages"], "--evaluate_on", "no images"),
    (SIMCLR, [*DIGITS, "--evaluate_on", "oneclass"], "--evaluate_on oneclass", "needs two"),
    (SIMCLR, [*DIGITS, "--encoder", "vgg"], "--encoder", "resnet18"),
    (SIMCLR, [*DIGITS, "--stem", "round"], "--stem", "imagenet"),
    (SIMCLR, [*DIGITS, "--norm", "layer"], "--norm", "group"),
    (SIMCLR, [*DIGITS, "--optimizer", "rmsprop"], "--optimizer", "lars"),
    (
        SIMCLR,
        [*DIGITS, "--nesterov", "--optimizer", "adam"],
        "--nesterov",
        "take sgd, lars or muon",
    ),
    (SIMCLR, [*DIGITS, "--optimizer", "muon", "--batch_size", "9000"], "--learning_rate", "none"),
    (SIMCLR, [*DIGITS, "--optimizer", "muon", "--loss", "kappa"], "--loss kappa", "than muon"),
    (SIMCLR, [*DIGITS, "--momentum", "1"], "--momentum", "below 1"),
    (SIMCLR, [*DIGITS, "--scaling", "cubic"], "--scaling", "sqrt"),
    (SIMCLR, [*DIGITS, "--views", "1"], "--views", "at least 2"),
    (SIMCLR, [*DIGITS, "--positives", "all"], "--positives", "mean"),
    (SIMCLR, [*DIGITS, "--activation", "swish"], "--activation", "gelu"),
    (SIMCLR, [*DIGITS, "--feature_dim", "0"], "--feature_dim", "at least 1"),
    (SIMCLR, [*DIGITS, "--width", "0"], "--width", "from 0.125 to 8"),
    (SIMCLR, [*DIGITS, "--head_layers", "-1"], "--head_layers", "0 or more"),
    (SIMCLR, [*DIGITS, "--head_dropout", "1"], "--head_dropout", "below 1"),
    (SIMCLR, [*DIGITS, "--crop_scale_max", "0.01"], "--crop_scale 0.08", "--crop_scale_max 0.01"),
    (SIMCLR, [*DIGITS, "--precision", "fp16"], "--precision fp16", "take bf16 or fp32"),
    (SIMCLR, [*DIGITS, "--probe", "svm"], "--probe", "lbfgs"),
    (SIMCLR, [*DIGITS, "--stages", "pretrain,dream"], "--stages", "choose from"),
    (SIMCLR, [*DIGITS, "--stages", "knn"], "--stages", "--checkpoint"),
    (SIMCLR, [*DIGITS, "--devices", "0"], "--devices", "at least 1"),
    (SIMCLR, [*DIGITS, "--devices", "9999"], "--devices", "this machine has"),
    (SIMCLR, [*DIGITS, "--num_nodes", "0"], "--num_nodes", "at least 1"),
    (SIMCLR, [*DIGITS, "--micro_batch_size", "1"], "--micro_batch_size", "from 2 to"),
    (SIMCLR, [*DIGITS, "--micro_batch_size", "1024"], "--micro_batch_size", "from 2 to"),
    (SIMCLR, [*DIGITS, "--max_time", "5h"], "--max_time", "DD:HH:MM:SS"),
    (SIMCLR, [*DIGITS, "--seed", "-1"], "--seed", "between 0 and"),
    (SIMCLR, [*DIGITS, "--seed", "4294967296"], "--seed", "between 0 and"),
    (SIMCLR, [*DIGITS, "--image_size", "2"], "--image_size", "between 4 and"),
    (SIMCLR, [*DIGITS, "--stem", "imagenet", "--image_size", "5", "--whiten"], "--whiten", "leave"),
    (SIMCLR, [*DIGITS, "--accelerator", "tpu"], "--accelerator", "cpu"),
    (SIMCLR, [*DIGITS, "--precision", "fp8"], "--precision", "bf16"),
    (SIMCLR, [*DIGITS, "--baselines", "maybe"], "--baselines", "true or false"),
    (RNN, [*DIGITS, "--cell", "qrnn"], "--cell", "lstm"),
    (RNN, [*DIGITS, "--hidden_size", "0"], "--hidden_size", "at least 1"),
    (RNN, [*DIGITS, "--patience", "-1"], "--patience", "0 or more"),
    (RNN, [*DIGITS, "--validation_fraction", "1"], "--validation_fraction", "between 0 and 1"),
    (RNN, [*DIGITS, *ALMOST_ALL.split()], ALMOST_ALL, "hold out less"),
    (TUNE, [*DIGITS, "--storage", "sqlite://"], "--storage sqlite://", "name a file"),
    (RNN, [*DIGITS, "--learning_rate", "-1"], "--learning_rate", "positive"),
    (RNN, [*DIGITS, "--max_time", "1:00"], "--max_time", "DD:HH:MM:SS"),
    (RNN, [*DIGITS, "--dropout", "0.2"], "--dropout", "--num_layers 2"),
    (RNN, [*DIGITS, "--dropout", "1", "--num_layers", "2"], "--dropout", "below 1"),
    (RNN, [*DIGITS, "--label_smoothing", "1"], "--label_smoothing", "below 1"),
    (RNN, [*DIGITS, "--crop_padding", "-1"], "--crop_padding", "0 or more"),
    (RNN, [*DIGITS, "--crop_padding", "9"], "--crop_padding 9", "at most 8"),
    (RNN, [*DIGITS, "--gradient_clip", ".inf"], "--gradient_clip", "0 or more"),
    (RNN, [*DIGITS, "--warmup_epochs", "3"], "--warmup_epochs", "--schedule one_cycle"),
    (RNN, [*DIGITS, *ALL_WARM_UP.split()], "--warmup_epochs", "below"),
    (RNN, [*DIGITS, "--pooling", "max"], "--pooling", "attention"),
    (RNN, ["--resume", "cycle", "--epochs", "9"], "--epochs 3", "leave it out"),
    (TUNE, [*DIGITS, "--n_trials", "0"], "--n_trials", "at least 1"),
    (TUNE, [*DIGITS, "--workers", "0"], "--workers", "at least 1"),
    (TUNE, [*DIGITS, "--train_fraction", "0"], "--train_fraction", "at most 1"),
    (TUNE, [*DIGITS, *A_TENTH.split()], A_TENTH, "too few for batch size 256"),
    (TUNE, [*DIGITS, "--space", "all"], "--space", "extended"),
    (TUNE, [*DIGITS, "--sampler", "grid"], "--sampler", "random"),
    (TUNE, [*DIGITS, "--timeout", "-1"], "--timeout", "positive"),
    (TUNE, [*DIGITS, "--heartbeat", "0"], "--heartbeat", "at least 2"),
    (TUNE, [*DIGITS, "--cell", "all"], "--cell", "lstm"),
    (TUNE, [*DIGITS, "--storage", "nonsense://x"], "--storage", "check the URL"),
    (SIMCLR, [*DIGITS, "--lerning_rate", "1"], "--lerning_rate", "--help"),
    (SIMCLR, [*DIGITS, "--epoch", "3"], "--epoch", "--help"),
    (SIMCLR, [*DIGITS, "digits"], "digits", "--help"),
    (RNN, [*DIGITS, "--devices", "2"], "--devices", "--help"),
    (SIMCLR, [*DIGITS, "--checkpoint", "imagenet.pt"], "--checkpoint", "leave it out"),
    (SIMCLR, [*DIGITS, "--probe_layer", "-1"], "--probe_layer", "0 or more"),
    (SIMCLR, [*DIGITS, "--probe_layer", "3"], "--probe_layer 3", "take at most as many"),
    (SIMCLR, [*KNN, "imagenet.pt", "--stem", "imagenet", *Z], "imagenet.pt", "last.ckpt"),
    (SIMCLR, [*KNN, "headless", *Z], "headless has no checkpoints/last.ckpt", "folder of a run"),
    (SIMCLR, ["--config", "nowhere.yaml"], "nowhere.yaml", "cannot be read"),
    (SIMCLR, ["--config", "empty"], "--config empty", "cannot be read"),
    *[
        (SIMCLR, ["--config", f"{n}.yaml"], f"{n}.yaml", "plain values")
        for n in ("damaged", "code", "tab", "binary")
    ],
    *[
        (SIMCLR, ["--config", f"{n}.yaml"], f"{n}.yaml", "key: value")
        for n in ("list", "word", "nothing")
    ],
    (SIMCLR, ["--config", "unknown.yaml"], "batchsize", "unknown key"),
    *[(RNN, ["--config", f"{n}.yaml"], "--epochs", "int") for n in ("nested", "type")],
    (RNN, ["--config", "null.yaml"], "--epochs", "must have a value"),
    (RNN, ["--config", "range.yaml"], "--epochs", "at least 1"),
    (RNN, ["--config", "date.yaml"], "--seed", "int"),
    (SIMCLR, ["--dataset", "mnist"], "--dataset mnist", "cifar10"),
    (SIMCLR, ["--dataset", ""], "--dataset", "name a data set"),
    (SIMCLR, ["--dataset", os.fsdecode(b"caf\xe9")], "--dataset must be a name in UTF-8", "rename"),
    (RNN, [*DIGITS, "--output_dir", os.fsdecode(b"\xff")], "--output_dir must be", "rename"),
    (SIMCLR, ["--dataset", "afile"], "--dataset afile", "cifar10"),
    (SIMCLR, ["--dataset", "empty"], "--dataset empty", "train/<class>/"),
    (SIMCLR, ["--dataset", "hidden"], "--dataset hidden", "train/<class>/"),
    (SIMCLR, ["--dataset", "noimages"], "noimages/train", "no images in"),
    (SIMCLR, ["--dataset", "oneclass"], "oneclass", "needs two"),
    (SIMCLR, ["--dataset", "newclass"], "newclass", "train/ lacks: z"),
    *[
        (SIMCLR, ["--dataset", name], file, "replace or remove it")
        for name, file in (
            ("broken", "broken/train/x/text.png"),
            ("zero", "zero/test/y/nothing.png"),
            ("cut", "cut/train/x/cut.png"),
            ("float", "float/train/y/float.tiff"),
        )
    ],
    (SIMCLR, ["--dataset", "huge"], "huge/train/x/huge.png is too large", "make it smaller"),
    (SIMCLR, ["--dataset", "notest", "--batch_size", "2"], "notest", "--stages pretrain"),
    (RNN, ["--dataset", "notest", "--batch_size", "2"], "notest", "notest/test/<class>"),
    (TUNE, ["--dataset", "oneclass"], "oneclass", "needs two"),
    (TUNE, ["--dataset", "few"], "--dataset few", "too few for batch size 256"),
    (RNN, ["--dataset", "cifar10", *A_FILE.split()], A_FILE, "name another folder"),
    (SIMCLR, [*DIGITS, "--batch_size", "5000"], "--batch_size 5000", "take at most 1438"),
    (SIMCLR, [*DIGITS, *TWO_DEVICES.split()], "--batch_size 1000", "take at most 719"),
    (RNN, [*DIGITS, "--batch_size", "5000"], "--batch_size 5000", "take at most 1295"),
    (SIMCLR, [*KNN, "nowhere.pt"], "nowhere.pt", "no such file"),
    (SIMCLR, [*KNN, "ends"], "--checkpoint ends", "folder of a run that has pretrained"),
    (SIMCLR, [*KNN, "empty"], "--checkpoint empty", "folder of a run"),
    *[
        (SIMCLR, [*KNN, file], file, "take another")
        for file in ("text.pt", "nothing.pt", "code.pt", "list.pt")
    ],
    *[
        (SIMCLR, [*KNN, file], file, "--encoder, --stem, --norm, --width and --feature_dim")
        for file in ("imagenet.pt", "rnn.ckpt")
    ],
    (SIMCLR, [*DIGITS, "--output_dir", "full"], "--output_dir full", "take a new folder"),
    (SIMCLR, [*DIGITS, "--output_dir", "afile"], "--output_dir afile", "take another folder"),
    (RNN, [*DIGITS, "--output_dir", "afile/x"], "--output_dir afile/x", "take another folder"),
    (RNN, ["--resume"], "--resume", "give the run's folder"),
    (RNN, ["--resume", "empty"], "--resume empty", "no run there"),
    (RNN, ["--resume", "nowhere"], "--resume nowhere", "no run there"),
    (RNN, ["--resume", "other"], "--resume other", "not one of this script"),
    (RNN, ["--resume", "badconfig"], "badconfig/config.yaml", "plain values"),
    (RNN, ["--resume", "codeconfig"], "codeconfig/config.yaml", "plain values"),
    (RNN, OTHERS.split(), "--cell rnn and --seed 0", "leave it out"),
    (RNN, ["--resume", "ends", "--epochs", "2"], "--epochs 3", "leave it out"),
    (SIMCLR, [*DIGITS, "--num_nodes", "2"], "--num_nodes 2", "torchrun or srun"),
    (RNN, ["--resume", "codecheckpoint"], "codecheckpoint/checkpoints", "start afresh"),
    (TUNE, ["--resume", "study"], "study/study.db", "check the URL"),
]


def test_the_table_is_long_enough():
    assert len(BAD) >= 100


@pytest.mark.parametrize(("script", "flags", "culprit", "remedy"), BAD)
def test_bad_input_is_one_line_and_changes_nothing(
    script, flags, culprit, remedy, bad_place, run_here
):
    before = {path: path.read_bytes() for path in bad_place.rglob("*") if path.is_file()}
    done = run_here(script, *flags, cwd=bad_place)
    assert done.returncode == 2

    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: ")
    assert culprit in line
    assert remedy in line

    after = {path: path.read_bytes() for path in bad_place.rglob("*") if path.is_file()}
    assert before.items() <= after.items()

    marks = (".lock", ".unfinished", "sessions.txt")
    new = [path for path in after.keys() - before.keys() if path.name not in marks]
    assert all("data/cache" in str(path) for path in new), "decoded images may be kept"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_where_there_is_none(run, tmp_path):
    """As a real process: exit status, one line on stderr, no traceback, nothing written."""
    done = run("rnn.py", "--dataset", "digits", "--accelerator", "cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--accelerator cuda" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_no_memory_holds_is_one_line(run_here, tmp_path):
    done = run_here("rnn.py", *DIGITS, "--hidden_size", 30_000_000, cwd=tmp_path)
    assert done.returncode == 2
    remedy = "take smaller batches, smaller images, or a smaller network"
    assert done.stderr == f"rnn.py: error: out of memory: {remedy}\n"


# ------------------------------------------------------------------------------------------------
# Fuzzing
# ------------------------------------------------------------------------------------------------

settings.register_profile("fuzz", deadline=None, derandomize=True)
QUICK = settings(
    settings.get_profile("fuzz"),
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ODD = ["1e3", "0x10", "~", "yes", "16:0.5,32:1", "-0", "digits", "../..", "{}", "[", "null", "\x00"]
FIELDS = sorted(simCLR.Config.__dataclass_fields__)
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    st.sampled_from(ODD),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def is_one_line(error):
    return len(str(error).splitlines()) == 1 and str(error).strip()


def parses_or_says_why(flags):
    """The parser gives a valid configuration or an error of one line, and nothing else."""
    with contextlib.suppress(SystemExit):  # --help and --print_config
        try:
            config = fn.parse_config(simCLR.Config, flags)
        except fn.UserError as error:
            return is_one_line(error)
        config.validate()
        saved = yaml.safe_load(command_line.as_yaml(config))
        return all(saved[k] == v for k, v in vars(config).items() if k not in config.of_the_session)
    return True


@QUICK
@given(values=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), VALUES, max_size=4))
def test_any_yaml_is_a_configuration_or_one_line(values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = yaml.safe_dump(values, allow_unicode=True)
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8", errors="replace")
    assert parses_or_says_why(["--config", "c.yaml"])


@QUICK
@given(data=st.binary(max_size=200))
def test_any_bytes_as_yaml_are_a_configuration_or_one_line(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_bytes(data)
    assert parses_or_says_why(["--config", "c.yaml"])


WORDS = (
    st.sampled_from([f"--{name}" for name in FIELDS])
    | st.text(string.printable, max_size=10)
    | SCALARS.map(str)
)


@QUICK
@given(flags=st.lists(WORDS, max_size=4))
def test_any_flags_are_a_configuration_or_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert parses_or_says_why(flags)


NAMES = st.text(
    st.characters(blacklist_characters="/\x00", blacklist_categories=("Cs",)),
    min_size=1,
    max_size=8,
)
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")


@settings(settings.get_profile("fuzz"), max_examples=60)
@given(
    files=st.lists(
        st.tuples(NAMES, st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 40)),
        max_size=5,
    ),
    junk=st.none() | st.tuples(NAMES, st.binary(max_size=60)),
    cut=st.booleans(),
)
def test_any_folder_is_decoded_or_one_line(files, junk, cut, tmp_path_factory):
    """Images of any name, format and size, perhaps with a file that is no image or is cut short."""
    folder = tmp_path_factory.mktemp("fuzz") / "images"
    folder.mkdir()
    for i, (name, kind, width, height) in enumerate(files):
        file = folder / f"{i}{name}"[:200]
        Image.new("RGB", (width, height), (i, 2 * i, 255)).save(file, format=kind)
        if cut and i == 0:
            file.write_bytes(file.read_bytes()[:-10])
    if junk is not None:
        (folder / f"z{junk[0]}").write_bytes(junk[1])
    said, data = [], None
    try:
        data = fn.load_dataset(str(folder), folder.parent / "data", 8)
    except fn.UserError as error:
        said.append(str(error))

    assert all(str(folder) in line for line in said)
    if data is None:
        return
    assert data.train_images.shape == (len(list(folder.iterdir())), 3, 8, 8)
    assert data.train_images.dtype == torch.uint8

    again = fn.load_dataset(str(folder), folder.parent / "data", 8)
    assert torch.equal(data.train_images, again.train_images)
