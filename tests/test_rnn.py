"""rnn.py: what the recurrent classifier reads, what it is made of, and how it trains."""

from types import SimpleNamespace

import pytest
import torch
from helpers import assert_rate
from torch import nn

import functions as fn
import rnn
from machinery import training


def tiny_splits(n: int = 40, seed: int = 0) -> rnn.Splits:
    """Three classes of 8 x 8 images that differ in brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    noise = torch.randint(0, 40, (n, 3, 8, 8), generator=generator)
    images = (noise + 80 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    validation, test = (images[:12], labels[:12]), (images[12:24], labels[12:24])
    return rnn.Splits((images, labels), validation, test, ("a", "b", "c"))


def tiny_config(**changes) -> rnn.Config:
    values = {"dataset": "digits", "hidden_size": 16, "l2": 8, "l3": 8, "epochs": 2}
    return rnn.Config(**{**values, "batch_size": 8, **changes})


def test_step_r_is_row_r_red_then_green_then_blue():
    images = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    sequence = rnn.rows_as_sequence(images)
    assert sequence.shape == (2, 4, 15)
    for b in range(2):
        for r in range(4):
            expected = [*images[b, 0, r], *images[b, 1, r], *images[b, 2, r]]
            assert sequence[b, r].tolist() == [int(v) for v in expected]


@pytest.mark.parametrize(("cell", "kind"), [("rnn", nn.RNN), ("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_model_is_the_cell_then_two_hidden_layers(cell, kind):
    model = rnn.SimpleRNN(96, 32, 2, 10, l2=24, l3=16, cell=cell)
    recurrent = model.recurrent
    assert type(recurrent) is kind
    sizes = (recurrent.input_size, recurrent.hidden_size, recurrent.num_layers)
    assert sizes == (96, 32, 2)

    layers = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout] * 2 + [nn.Linear]
    assert [type(layer) for layer in model.head] == layers
    sizes = [(m.in_features, m.out_features) for m in model.head if type(m) is nn.Linear]
    assert sizes == [(32, 24), (24, 16), (16, 10)]
    assert [m.p for m in model.head if type(m) is nn.Dropout] == [0.5, 0.5]
    assert model(torch.randn(4, 32, 96)).shape == (4, 10)


def test_plain_rnn_is_elmans_recurrence():
    """h_t = tanh(W x_t + b + U h_(t-1) + c), read after the last row."""
    torch.manual_seed(0)
    model = rnn.SimpleRNN(6, 5, 1, 3, l2=4, l3=4).eval()
    x = torch.randn(2, 7, 6)
    cell, h = model.recurrent, torch.zeros(2, 5)
    for t in range(7):
        from_row = x[:, t] @ cell.weight_ih_l0.T + cell.bias_ih_l0
        from_state = h @ cell.weight_hh_l0.T + cell.bias_hh_l0
        h = torch.tanh(from_row + from_state)
    torch.testing.assert_close(model(x), model.head(h))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("layers", [1, 2])
def test_last_pooling_reads_each_direction_to_its_end(cell, layers):
    """The head sees PyTorch's h_n of the top layer.

    Reading downwards, that is after the last row; upwards, after the first.
    """
    torch.manual_seed(0)
    for bidirectional in (False, True):
        model = rnn.SimpleRNN(6, 5, layers, 3, 4, 4, cell, bidirectional)
        outputs, state = model.recurrent(torch.randn(2, 7, 6))
        h_n = state[0] if cell == "lstm" else state
        expected = torch.cat([h_n[-2], h_n[-1]], 1) if bidirectional else h_n[-1]
        torch.testing.assert_close(model.pool(outputs), expected)
        assert model(torch.randn(2, 7, 6)).shape == (2, 3)


def test_mean_and_attention_pooling_are_weighted_means_of_all_rows():
    torch.manual_seed(0)
    outputs = torch.randn(2, 7, 5)
    model = rnn.SimpleRNN(6, 5, 1, 3, 4, 4, pooling="mean")
    torch.testing.assert_close(model.pool(outputs), outputs.mean(1))

    model = rnn.SimpleRNN(6, 5, 1, 3, 4, 4, pooling="attention")
    weight, bias = model.attention.weight, model.attention.bias
    for b in range(2):
        score = [torch.exp(weight @ h + bias).item() for h in outputs[b]]
        expected = sum(e * h for e, h in zip(score, outputs[b], strict=True)) / sum(score)
        torch.testing.assert_close(model.pool(outputs)[b], expected)


def test_dropout_acts_between_layers_in_training_only():
    torch.manual_seed(0)
    model, x = rnn.SimpleRNN(6, 5, 2, 3, 4, 4, dropout=0.5), torch.randn(2, 7, 6)
    assert model.recurrent.dropout == 0.5
    assert not torch.equal(model.recurrent(x)[0], model.recurrent(x)[0])
    model.eval()
    assert torch.equal(model.recurrent(x)[0], model.recurrent(x)[0])


def test_a_crop_is_a_window_of_the_padded_image():
    """The (2 p + 1)^2 windows, mirrored or not, are drawn equally often, and nothing else is."""
    torch.manual_seed(0)
    image, draws = torch.randint(1, 256, (3, 4, 5), dtype=torch.uint8), 20_000
    cut = rnn.random_crop_and_flip(image.expand(draws, -1, -1, -1), 1, 0.5)
    assert cut.dtype == torch.uint8
    assert cut.shape == (draws, 3, 4, 5)

    padded = torch.zeros(3, 6, 7, dtype=torch.uint8)
    padded[:, 1:5, 1:6] = image
    counts = []
    for top in range(3):
        for left in range(3):
            window = padded[:, top : top + 4, left : left + 5]
            for wanted in (window, window.flip(2)):
                counts.append(int((cut == wanted).flatten(1).all(1).sum()))

    assert sum(counts) == draws
    expected = draws / 18
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    assert chi_square < 40.8  # 17 degrees of freedom, 0.1 %


def test_without_augmentation_images_stay_as_they_are_and_nothing_is_drawn():
    images, state = tiny_splits().train[0], torch.get_rng_state()
    assert rnn.random_crop_and_flip(images, 0, 0.0) is images
    assert torch.equal(torch.get_rng_state(), state)


def test_images_are_augmented_and_labels_smoothed_in_training_only(monkeypatch):
    seen = []

    def note(images, *how):
        seen.append(how)
        return images

    monkeypatch.setattr(rnn, "random_crop_and_flip", note)
    config, splits = tiny_config(crop_padding=2, flip=True, label_smoothing=0.3), tiny_splits()
    model = rnn.build_model(config, "rnn", splits.train[0], 3, config.seed)
    module = rnn.RowClassification(model, splits, config).eval()

    batch = splits.train[0][:8], splits.train[1][:8]
    logits = module(batch[0])
    smooth = 0.7 * nn.functional.one_hot(batch[1], 3) + 0.1
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(module.training_step(batch, 0)["loss"], expected)
    assert seen == [(2, 0.5)]

    logged = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    module.validation_step(batch, 0)
    expected = nn.functional.cross_entropy(logits, batch[1])
    torch.testing.assert_close(logged["validation_loss"], expected)
    assert len(seen) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_is_clipped(precision):
    norms = []

    def norm(module):
        return float(nn.utils.get_total_norm([p.grad for p in module.parameters()]))

    class Look(rnn.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norms.append([norm(pl_module)])

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if norms:
                norms[-1].append(norm(pl_module))

    config = tiny_config(gradient_clip=0.05, precision=precision, epochs=1)
    rnn.train(config, "lstm", tiny_splits(), callbacks=[Look()])
    pairs = norms[:-1]  # without the last step, whose gradient is seen once only
    assert len(pairs) == 4
    assert min(before for before, _ in pairs) > 0.05
    assert [after for _, after in pairs] == pytest.approx([0.05] * 4, rel=1e-3)


def test_one_cycle_rises_for_the_warm_up_and_falls_to_nothing():
    rates = []

    class Look(rnn.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    config = tiny_config(schedule="one_cycle", epochs=4, warmup_epochs=1, learning_rate=0.01)
    rnn.train(config, "rnn", tiny_splits(), callbacks=[Look()])

    assert len(rates) == 20
    assert rates.index(max(rates)) == 4
    assert max(rates) == pytest.approx(0.01)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert (rates[0], rates[-1]) == (pytest.approx(0.01 / 25), pytest.approx(0, abs=1e-7))


@pytest.mark.parametrize(("n", "epochs"), [(8, 3), (9, 3), (16, 2)])
def test_one_cycle_of_a_few_steps(n, epochs):
    """A warm-up of one step counts as none, because PyTorch would divide by 0."""
    config = tiny_config(schedule="one_cycle", epochs=epochs, warmup_epochs=1)
    assert len(rnn.train(config, "rnn", tiny_splits(n)).rows) == epochs


def test_epochs_may_grow_on_a_plateau_only():
    assert rnn.Config().may_grow == ("epochs",)
    assert rnn.Config(schedule="one_cycle").may_grow == ()


# ------------------------------------------------------------------------------------------------
# What does it look at?
# ------------------------------------------------------------------------------------------------


def trained(cell="gru", **changes):
    config = tiny_config(**changes)
    return rnn.train(config, cell, tiny_splits()).module, config.machine


@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_after_each_row_is_the_network_on_the_rows_so_far(bidirectional, pooling):
    torch.manual_seed(0)
    model = rnn.SimpleRNN(6, 5, 2, 3, 4, 4, "lstm", bidirectional, pooling=pooling).eval()
    x = torch.randn(2, 7, 6)
    expected = torch.stack([model(x[:, :k]) for k in range(1, 8)], 1)
    torch.testing.assert_close(model.after_each_row(x), expected)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_accuracy_by_rows_is_that_of_the_sequence_cut_off(bidirectional):
    module, machine = trained(bidirectional=bidirectional)
    images, labels = tiny_splits().test
    module.eval()
    expected = []
    for k in range(1, 9):
        sequence = rnn.rows_as_sequence(module.normalize(images))[:, :k]
        expected.append(fn.accuracy(module.model(sequence).argmax(1), labels))
    found = rnn.accuracy_by_rows(module, images, labels, machine)

    assert found == expected
    predictions = fn.extract_features(module, images, machine).argmax(1)
    assert found[-1] == fn.accuracy(predictions, labels)


def test_gradient_by_row_is_the_mean_norm_image_by_image():
    module, machine = trained()
    images, labels = tiny_splits().test
    module.double().eval()
    total = torch.zeros(8, dtype=torch.float64)
    for image, label in zip(images, labels, strict=True):
        rows = rnn.rows_as_sequence(module.normalize(image[None]).double()).requires_grad_()
        nn.functional.cross_entropy(module.model(rows), label[None]).backward()
        total += rows.grad[0].norm(dim=1)
    found = rnn.gradient_by_row(module.float(), images, labels, machine)

    assert sum(found) == pytest.approx(1)
    assert found == pytest.approx((total / total.sum()).tolist(), rel=1e-4)


def test_what_a_network_without_memory_has_read_is_its_last_row():
    module, machine = trained("rnn")
    module.model.recurrent.weight_hh_l0.data.zero_()
    assert rnn.gradient_by_row(module, *tiny_splits().test, machine) == [0, 0, 0, 0, 0, 0, 0, 1]


def test_where_no_gradient_comes_through_shares_are_0():
    module, machine = trained()
    module.model.head[-1].weight.data.zero_()
    assert rnn.gradient_by_row(module, *tiny_splits().test, machine) == [0] * 8


@pytest.mark.parametrize("shares", [[0.2, 0.3, 0.5], [1e-7, 1e-3, 0.999], [0, 0, 1], [0, 0, 0]])
def test_rows_figure_labels_the_ends_of_its_axis(tmp_path, monkeypatch, shares):
    figures = []
    monkeypatch.setattr(fn, "save_figure", lambda figure, file: figures.append(figure))
    outcome = SimpleNamespace(accuracy_by_rows=[0.1, 0.2, 0.3], gradient_by_row=shares)
    rnn.plot_rows({"gru": outcome}, 10, tmp_path / "x.png")

    axis = figures[0].axes[1]
    low, high = axis.get_ylim()
    ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
    assert len(ticks) >= 2
    assert low <= min((share for share in shares if share), default=1)


def test_unknown_pooling_is_an_error():
    with pytest.raises(ValueError, match="last, mean or attention, got max"):
        rnn.SimpleRNN(6, 5, 1, 3, l2=4, l3=4, pooling="max")


def test_unknown_cell_is_an_error():
    with pytest.raises(KeyError):
        rnn.SimpleRNN(6, 5, 1, 3, l2=4, l3=4, cell="transformer")


def test_default_recipe():
    config = rnn.Config()
    assert (config.hidden_size, config.num_layers, config.l2, config.l3) == (256, 1, 64, 64)
    assert (config.learning_rate, config.weight_decay) == (0.00022, 0.00052)
    assert (config.batch_size, config.epochs) == (64, 100)

    model = rnn.build_model(config, "rnn", torch.zeros(1, 3, 32, 32), 10, config.seed)
    chosen = rnn.RowClassification(model, tiny_splits(200), config).configure_optimizers()
    optimiser = chosen["optimizer"]
    assert type(optimiser) is torch.optim.Adam
    assert (optimiser.defaults["lr"], optimiser.defaults["weight_decay"]) == (0.00022, 0.00052)

    plateau = chosen["lr_scheduler"]["scheduler"]
    assert type(plateau) is torch.optim.lr_scheduler.ReduceLROnPlateau
    assert (plateau.patience, plateau.factor, plateau.mode) == (10, 0.1, "min")


def test_split_is_stratified_and_leaves_the_test_images_alone():
    data = fn.load_dataset("digits")
    splits = rnn.split(data, 0.1, seed=0)
    assert len(splits.train[0]) + len(splits.validation[0]) == len(data.train_images)
    torch.testing.assert_close(splits.test[0], data.test_images)

    share = splits.validation[1].bincount() / data.train_labels.bincount()
    assert ((share - 0.1).abs() < 0.01).all()

    rows = {tuple(image.flatten().tolist()) for image in splits.validation[0]}
    assert not rows & {tuple(image.flatten().tolist()) for image in splits.train[0]}


def test_batch_above_the_set_is_refused():
    splits = rnn.split(fn.load_dataset("digits"), 0.1, seed=0)
    with pytest.raises(fn.UserError, match="--batch_size 5000"):
        rnn.check_data(splits, rnn.Config(batch_size=5000))


@pytest.mark.parametrize("n", [40, 41])  # of 41 images, batches of 8 would leave one alone
def test_training_learns_and_the_best_epoch_is_returned(tmp_path, n):
    config = tiny_config(epochs=6, learning_rate=0.01)
    trained = rnn.train(config, "gru", tiny_splits(n), tmp_path)
    rows = trained.rows
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]

    best = max(row["validation_accuracy"] for row in rows)
    images, labels = tiny_splits(n).validation
    predictions = fn.extract_features(trained.module, images, config.machine).argmax(1)
    assert fn.accuracy(predictions, labels) == pytest.approx(best)


def test_same_seed_same_numbers(tmp_path):
    """Weights, order and dropout follow from the seed alone; another seed gives other numbers."""
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(torch.seed())
        runs.append(rnn.train(tiny_config(seed=seed), "rnn", tiny_splits()))
    losses = [[(row["train_loss"], row["validation_loss"]) for row in run.rows] for run in runs]
    assert losses[0] == losses[1] != losses[2]


ALL_OF_IT = {
    "schedule": "one_cycle",
    "warmup_epochs": 2,
    "num_layers": 2,
    "dropout": 0.3,
    "pooling": "attention",
    "bidirectional": True,
    "gradient_clip": 0.5,
    "label_smoothing": 0.1,
    "crop_padding": 2,
    "flip": True,
}


@pytest.mark.parametrize("changes", [{"patience": 0}, ALL_OF_IT], ids=["plateau", "one_cycle"])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, changes):
    """A run stopped and resumed has the weights and metrics of a run never interrupted."""

    class Stop(rnn.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise KeyboardInterrupt

    # With patience 0, the learning rate falls during the run.
    config = tiny_config(epochs=7, learning_rate=0.5, **changes)
    whole = rnn.train(config, "lstm", tiny_splits(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        rnn.train(config, "lstm", tiny_splits(), tmp_path / "parts", [Stop()])
    parts = rnn.train(config, "lstm", tiny_splits(), tmp_path / "parts")

    states = [run.module.state_dict().values() for run in (whole, parts)]
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)

    def timeless(rows):
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]

    assert timeless(whole.rows) == timeless(parts.rows)
    rates = {row["learning_rate"] for row in whole.rows}
    assert len(rates) > 1, "the schedule was not exercised"


def stub_trainer(saved, best, epochs=100):
    """What Checkpoints asks of a trainer; `saved` hears of last.ckpt and best.ckpt."""

    def save_checkpoint(path):
        saved.append((path.name, torch.load(best)["state_dict"]["weight"].clone()))

    strategy = SimpleNamespace(broadcast=lambda value: value)
    options = {"should_stop": False, "current_epoch": 0, "max_epochs": epochs}
    options |= {"is_global_zero": True, "strategy": strategy}
    return SimpleNamespace(save_checkpoint=save_checkpoint, **options)


def test_the_best_epoch_is_kept_before_the_last(tmp_path):
    """A run killed between the two repeats the epoch.

    In the other order, it would take a best epoch as kept that it never wrote.
    """
    log, saved, module = fn.EpochLog(), [], nn.Linear(1, 1)
    log.rows = [{"validation_accuracy": 0.1}, {"validation_accuracy": 0.2}]
    trainer = stub_trainer(saved, tmp_path / "best.ckpt")
    checkpoints = fn.Checkpoints(tmp_path, log, best="validation_accuracy")
    checkpoints.on_train_epoch_end(trainer, module)
    best = module.weight.detach().clone()
    assert saved == [("last.ckpt", best)]

    module.weight.data += 1
    log.rows.append({"validation_accuracy": 0.2})  # the same value is no improvement
    checkpoints.on_train_epoch_end(trainer, module)
    assert saved[1:] == [("last.ckpt", best)]
    assert torch.equal(checkpoints.state_dict()["best_weights"]["weight"], best)


def test_checkpoints_come_when_their_time_is_over_and_at_the_end(tmp_path, monkeypatch):
    """Epochs of 8 seconds, a checkpoint every 30: after epochs 4, 8 and the last."""
    now = [1000.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    log, saved, module = fn.EpochLog(), [], nn.Linear(1, 1)
    trainer = stub_trainer(saved, tmp_path / "best.ckpt", epochs=10)
    checkpoints = fn.Checkpoints(tmp_path, log, "validation_accuracy", every=30)
    epochs = []
    for epoch in range(10):
        now[0] += 8
        trainer.current_epoch = epoch
        module.weight.data.fill_(epoch)
        log.rows.append({"validation_accuracy": 0.5 - abs(epoch - 5) / 10})  # epoch 5 is best
        before = len(saved)
        checkpoints.on_train_epoch_end(trainer, module)
        epochs += [epoch] * (len(saved) - before)
    assert epochs == [3, 7, 9]
    assert [int(best) for _, best in saved] == [3, 5, 5]


def test_a_run_that_is_to_stop_leaves_a_checkpoint(tmp_path):
    log, saved, module = fn.EpochLog(), [], nn.Linear(1, 1)
    log.rows = [{"validation_accuracy": 0.1}]
    trainer = stub_trainer(saved, tmp_path / "best.ckpt")
    checkpoints = fn.Checkpoints(tmp_path, log, "validation_accuracy", every=30)
    checkpoints.on_train_epoch_end(trainer, module)
    assert saved == []
    trainer.should_stop = True
    checkpoints.on_train_epoch_end(trainer, module)
    assert len(saved) == 1


@pytest.mark.parametrize("patience", [0, 1])
def test_learning_rate_falls_on_a_plateau(patience):
    """It falls to a tenth after more than `patience` epochs without a new lowest loss."""
    config = tiny_config(epochs=10, learning_rate=0.3, patience=patience)
    rows = rnn.train(config, "rnn", tiny_splits()).rows

    rate, lowest, bad, expected = 0.3, float("inf"), 0, []
    for row in rows:
        expected.append(rate)
        if row["validation_loss"] < lowest * 0.9999:
            lowest, bad = row["validation_loss"], 0
        else:
            bad += 1
        if bad > patience:
            rate, bad = rate / 10, 0

    assert expected[-1] < expected[0], "it fell at all"
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(fn.Diverged, match=r"epoch 1, step \d+, learning rate 1e\+30"):
        rnn.train(tiny_config(learning_rate=1e30), "rnn", tiny_splits(), tmp_path)


BAD_VALUES = [
    *[(name, 0) for name in ("epochs", "hidden_size", "num_layers", "l2", "l3")],
    *[("learning_rate", 0), ("validation_fraction", 0), ("batch_size", 1)],
    *[("learning_rate", float("nan")), ("weight_decay", -1.0), ("patience", -1)],
    *[("dropout", 0.5), ("dropout", 1.0), ("label_smoothing", 1.0), ("label_smoothing", -0.1)],
    *[("crop_padding", -1), ("gradient_clip", float("inf"))],
    *[("warmup_epochs", -1), ("warmup_epochs", 3), ("flip", 1.5), ("flip", -0.1)],
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(fn.UserError, match=f"--{field} "):
        rnn.Config(**{field: value}).validate()


def test_a_flip_is_a_probability_and_the_older_switch_is_one_half():
    assert [rnn.Config(flip=flip).flip for flip in (True, False, 0.3, 1, 0)] == [0.5, 0, 0.3, 1, 0]
    config = fn.parse_config(rnn.Config, ["--flip", "true", "--dataset", "digits"])
    assert config.flip == 0.5


def test_images_are_mirrored_as_often_as_asked():
    torch.manual_seed(0)
    images = torch.arange(5, dtype=torch.uint8).expand(20_000, 3, 4, 5)
    mirrored = rnn.random_crop_and_flip(images, 0, 0.3)[:, 0, 0, 0] == 4
    assert_rate(int(mirrored.sum()), 20_000, 0.3)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_bfloat16_works_on_every_cpu(cell, monkeypatch):
    """oneDNN has no LSTM in bfloat16 on CPUs without AVX-512: there the layer stays in float32."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    torch.manual_seed(0)
    model, x = rnn.SimpleRNN(6, 5, 2, 3, 4, 4, cell).eval(), torch.randn(2, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    logits.sum().backward()
    torch.testing.assert_close(logits.float(), model(x), rtol=0.05, atol=0.05)
