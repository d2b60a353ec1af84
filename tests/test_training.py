"""Training on a few real images: the optimisation is the one that is meant, and its numbers mean what they say."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mnist_vae.data.dataset import hold_out
from mnist_vae.errors import UserError
from mnist_vae.model.vae import VAE, negative_elbo, negative_iwae_bound
from mnist_vae.training.data_module import Chunks
from mnist_vae.training.fit import fit, seed_everything
from mnist_vae.training.module import VAETraining, pixels
from stages.stage import Stopped, end_on_signals
from tests.training import CONFIG, Recorder, settings, weights

STANDING_STILL = {"learning_rate": 1e-30, "weight_decay": 0.0}  # no step is large enough to change a weight


class AtEpochEnd(Callback):
    """Calls a function with the model at each epoch's end."""

    def __init__(self, function):
        self.function = function

    def on_train_epoch_end(self, trainer, module):
        self.function(module.vae)


@pytest.fixture
def images(digits_dataset):
    return digits_dataset.x_train[::97][:100]


def first_weights(seed=1):
    """The weights that ``fit`` starts from; leaves torch's generator where ``fit`` has it then."""
    seed_everything(seed)
    return VAE(CONFIG)


def shuffled(images):
    order = torch.randperm(len(images))
    return torch.from_numpy(images).flatten(1)[order].float() / 255


# the losses that are reported


def test_the_losses_fall(images):
    history = fit(images, CONFIG, settings(epochs=5, learning_rate=5e-3)).history

    losses = [row["loss"] for row in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_there_is_a_row_per_epoch_numbered_from_1(images):
    history = fit(images, CONFIG, settings(epochs=3)).history

    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert all(set(row) == {"epoch", "loss", "bce", "kld"} for row in history)


def test_callbacks_hear_of_epochs_and_chunks_but_not_of_single_steps(images):
    heard = []

    class Listener(Callback):
        def on_train_batch_end(self, *args):
            heard.append("chunk")

        def on_train_epoch_end(self, *args):
            heard.append("epoch")

        def on_before_backward(self, *args):
            heard.append("step")

        on_after_backward = on_before_optimizer_step = on_before_backward

    fit(images, CONFIG, settings(epochs=2, batch_size=2), callbacks=[Listener()])

    assert heard == ["chunk", "chunk", "epoch"] * 2


@pytest.mark.parametrize("kl_warmup", [0, 0.5, 1])
def test_the_loss_is_bce_plus_weighted_kl_also_while_the_weight_rises(images, kl_warmup):
    for row in fit(images, CONFIG, settings(kl_weight=3.0, kl_warmup=kl_warmup)).history:
        assert row["loss"] == pytest.approx(row["bce"] + 3 * row["kld"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [99, 2], ids=["a last batch of one", "a last chunk that is smaller"])
def test_every_image_weighs_the_same_in_the_reported_loss(images, batch_size):
    (row,) = fit(images, CONFIG, settings(epochs=1, batch_size=batch_size, **STANDING_STILL)).history

    vae = first_weights()
    with torch.no_grad():
        batches = [(x, *vae(x)) for x in shuffled(images).split(batch_size)]
        terms = [negative_elbo(logits, x, posterior) for x, logits, posterior in batches]
    loss, bce, kld = (float(sum(term)) / 100 for term in zip(*terms, strict=True))
    assert row == pytest.approx({"epoch": 1, "loss": loss, "bce": bce, "kld": kld}, rel=1e-5)


@pytest.mark.parametrize("validation_size", [0, 30])
def test_the_logger_gets_each_epochs_losses_once_without_rounding(images, validation_size):
    logger = Recorder()
    history = fit(images, CONFIG, settings(epochs=3, validation_size=validation_size), logger=logger).history

    assert [step for step, _ in logger.records] == [1, 2, 3]
    for (_, metrics), row in zip(logger.records, history, strict=True):
        expected = {f"train/{name}": row[name] for name in ("loss", "bce", "kld")}
        if validation_size:
            expected |= {f"val/{name}": row[f"val_{name}"] for name in ("loss", "bce", "kld")}
        assert metrics == expected
        assert metrics["train/loss"] != float(np.float32(metrics["train/loss"]))  # so rounding would show


def test_callbacks_see_the_model_that_is_returned(images):
    seen = []
    trained = fit(images, CONFIG, settings(epochs=3), callbacks=[AtEpochEnd(seen.append)])

    assert len(seen) == 3
    assert all(vae is trained.vae for vae in seen)


def test_where_nobody_watches_each_epoch_prints_a_line(images, capsys):
    trained = fit(images, CONFIG, settings())

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    for line, row in zip(lines, trained.history, strict=True):
        assert f"loss {row['loss']:.2f}, bce {row['bce']:.2f}, kld {row['kld']:.2f} nats/image" in line


# the optimisation


def test_a_step_is_adams_on_the_sum_over_the_batch(images):
    # With so large an eps and weight decay, the scale of the gradient decides the step.
    chosen = settings(epochs=1, batch_size=100, eps=10.0, weight_decay=0.5, learning_rate=0.1, kl_weight=2.0)

    vae = first_weights()
    x = shuffled(images)
    logits, posterior = vae(x)
    negative_elbo(logits, x, posterior, 2.0).loss.backward()
    with torch.no_grad():
        for weight in vae.parameters():
            gradient = weight.grad + 0.5 * weight
            weight -= 0.1 * gradient / (gradient.abs() + 10)  # Adam's first step

    torch.testing.assert_close(weights(fit(images, CONFIG, chosen).vae), weights(vae), rtol=1e-4, atol=1e-6)


def test_an_epoch_takes_a_step_per_mini_batch_with_adams_own_memory(images):
    chosen = settings(epochs=2, batch_size=2, betas=[0.5, 0.7], learning_rate=0.003)  # 50 steps, in two chunks

    vae = first_weights()
    adam = torch.optim.Adam(vae.parameters(), lr=0.003, betas=(0.5, 0.7), eps=1e-8, weight_decay=1e-5)
    for _ in range(2):
        for x in shuffled(images).split(2):
            logits, posterior = vae(x)
            adam.zero_grad()
            negative_elbo(logits, x, posterior).loss.backward()
            adam.step()

    torch.testing.assert_close(weights(fit(images, CONFIG, chosen).vae), weights(vae), rtol=1e-2, atol=1e-3)


def test_equal_seeds_give_equal_bits_and_others_do_not(images):
    first, again, other = (weights(fit(images, CONFIG, settings(seed=seed)).vae) for seed in (1, 1, 2))

    assert first.numpy().tobytes() == again.numpy().tobytes()
    assert not torch.equal(first, other)


def test_the_kl_weight_trades_reconstruction_for_prior(images):
    light, heavy = (fit(images, CONFIG, settings(epochs=20, kl_weight=w)).history[-1] for w in (0.0, 20.0))

    assert light["kld"] > heavy["kld"]
    assert light["bce"] < heavy["bce"]


@pytest.mark.parametrize("kl_warmup", [0, 0.25, 0.3, 1])
def test_the_kl_weight_rises_in_a_line_over_its_share_of_all_steps(kl_warmup):
    chosen = settings(epochs=4, batch_size=16, kl_weight=3.0, kl_warmup=kl_warmup)
    module = VAETraining(VAE(CONFIG), chosen, None, train_images=100)

    rising = [kl_warmup and 3 * step / (kl_warmup * 4 * 7) for step in range(4 * 7 + 1)]
    expected = [min(3, weight) if kl_warmup else 3 for weight in rising]

    assert [module.kl_weight(step) for step in range(4 * 7 + 1)] == pytest.approx(expected, rel=1e-12)
    assert module.kl_weight(4 * 7) == 3


@pytest.mark.parametrize("draws", [1, 5])
def test_each_step_minimises_the_bound_with_its_own_kl_weight(images, draws):
    # With so large an eps, the scale of the gradient decides the step. 50 steps an epoch, in two chunks.
    large = {"epochs": 2, "batch_size": 2, "eps": 1e3, "learning_rate": 0.3, "weight_decay": 0.0, "betas": [0.0, 0.99]}
    chosen = settings(**large, kl_weight=4.0, kl_warmup=0.75, importance_samples=draws)

    vae, step = first_weights(), 0
    adam = torch.optim.Adam(vae.parameters(), lr=0.3, betas=(0.0, 0.99), eps=1e3)
    for _ in range(2):
        for x in shuffled(images).split(2):
            kl_weight = 4 * min(1, step / 75)
            if draws == 1:
                logits, posterior = vae(x)
                loss = negative_elbo(logits, x, posterior, kl_weight).loss
            else:
                posterior = vae.encode(x)
                z = posterior.sample(draws=draws)
                loss = negative_iwae_bound(vae.decode(z), x, z, posterior, kl_weight).loss
            adam.zero_grad()
            loss.backward()
            adam.step()
            step += 1

    trained = weights(fit(images, CONFIG, chosen).vae)
    torch.testing.assert_close(trained, weights(vae), rtol=1e-3, atol=1e-4)
    assert (trained - weights(fit(images, CONFIG, chosen.model_copy(update={"kl_warmup": 0})).vae)).abs().max() > 0.01


def test_with_several_draws_the_loss_is_the_negative_iwae_bound_per_image(images):
    chosen = settings(epochs=1, batch_size=99, importance_samples=5, kl_weight=2.0, kl_warmup=1, **STANDING_STILL)
    (row,) = fit(images, CONFIG, chosen).history

    vae, total = first_weights(), torch.zeros(3)
    with torch.no_grad():
        for x in shuffled(images).split(99):
            posterior = vae.encode(x)
            z = posterior.sample(draws=5)
            total += torch.stack(negative_iwae_bound(vae.decode(z), x, z, posterior, 2.0))
    loss, bce, kld = (total / 100).tolist()
    assert row == pytest.approx({"epoch": 1, "loss": loss, "bce": bce, "kld": kld}, rel=1e-5)


def test_a_constant_rate_is_constant_and_a_one_cycle_rate_rises_to_its_peak_and_falls(images, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def recorded(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    fit(images, CONFIG, settings(epochs=4, schedule="constant"))
    constant = rates.copy()
    rates.clear()
    fit(images, CONFIG, settings(epochs=4, schedule="one_cycle", learning_rate=4e-3))

    assert constant == [1e-3] * 4 * 7  # 100 images are seven batches of at most 16
    assert len(rates) == 4 * 7
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(4e-3, rel=0.02)
    assert 0 < peak < 14
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] < 4e-3 / 10
    assert rates[-1] < 4e-3 / 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_accelerator_that_is_not_there_is_named(images):
    with pytest.raises(UserError, match=r"params\.yaml: train\.accelerator is 'gpu'"):
        fit(images, CONFIG, settings(accelerator="gpu"))


@pytest.mark.filterwarnings("error")
def test_a_precision_that_a_cpu_lacks_is_refused(images):
    refused = r"^params\.yaml: train\.precision is '16-mixed', which needs a GPU; bf16-mixed works on a CPU too$"
    with pytest.raises(UserError, match=refused):
        fit(images, CONFIG, settings(precision="16-mixed"))


# early stopping


def test_training_stops_when_the_training_loss_no_longer_improves_enough(images):
    improving_too_little = settings(epochs=20, patience=3, min_delta=1e6)

    assert len(fit(images, CONFIG, improving_too_little).history) == 1 + 3


def test_training_goes_on_while_the_loss_improves(images):
    assert len(fit(images, CONFIG, settings(epochs=8, patience=0)).history) == 8


@pytest.mark.parametrize("validation_size", [0, 30])
def test_early_stopping_begins_to_watch_when_the_kl_weight_has_risen(images, validation_size):
    improving_too_little = settings(
        epochs=12, patience=2, min_delta=1e6, kl_warmup=0.5, validation_size=validation_size
    )

    assert len(fit(images, CONFIG, improving_too_little).history) == 6 + 2


def test_with_images_held_out_early_stopping_watches_their_loss(images):
    chosen = settings(epochs=20, patience=2, validation_size=30, learning_rate=1e-2)
    _, held_out = hold_out(np.arange(100), 30, seed=1)
    opposite = np.zeros_like(images)
    opposite[held_out] = 255  # the better the others are learnt, the worse these fit

    trained = fit(opposite, CONFIG, chosen)

    history = trained.history
    assert trained.best_epoch == 1
    assert len(history) == 1 + 2
    assert history[2]["loss"] < history[1]["loss"] < history[0]["loss"]
    assert history[2]["val_loss"] > history[1]["val_loss"] > history[0]["val_loss"]


# held-out images


def test_held_out_images_are_measured_but_not_trained_on(images):
    chosen = settings(validation_size=30)
    _, held_out = hold_out(np.arange(100), 30, seed=1)
    others_blank = images.copy()
    others_blank[held_out] = 0

    first_weights, second_weights = [], []
    first, second = (
        fit(x, CONFIG, chosen, callbacks=[AtEpochEnd(lambda vae, kept=kept: kept.append(weights(vae)))]).history
        for x, kept in ((images, first_weights), (others_blank, second_weights))
    )

    assert len(first_weights) == 2
    assert all(map(torch.equal, first_weights, second_weights))
    assert first[-1]["loss"] == second[-1]["loss"]
    assert first[-1]["val_loss"] != second[-1]["val_loss"]


def test_the_noise_of_validation_is_the_same_at_every_epoch(images):
    history = fit(images, CONFIG, settings(epochs=3, validation_size=30, **STANDING_STILL)).history

    assert len({row["val_loss"] for row in history}) == 1
    assert len({row["loss"] for row in history}) == 3


def test_the_validation_loss_is_that_of_the_model_at_the_epochs_end_per_image(images, monkeypatch):
    monkeypatch.setattr("mnist_vae.training.data_module.VALIDATION_BATCH", 20)  # 30 images are a batch and a half
    _, held_out = hold_out(np.arange(100), 30, seed=1)
    x = torch.from_numpy(images[held_out]).flatten(1).float() / 255
    measured = []

    def measure(vae):
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            terms = [negative_elbo(logits, part, q) for part in x.split(20) for logits, q in [vae(part, noise)]]
        measured.append(float(sum(term.loss for term in terms)) / 30)

    chosen = settings(epochs=3, validation_size=30)
    history = fit(images, CONFIG, chosen, callbacks=[AtEpochEnd(measure)]).history

    assert [row["val_loss"] for row in history] == pytest.approx(measured, rel=1e-5)
    assert all(row["val_loss"] == pytest.approx(row["val_bce"] + row["val_kld"]) for row in history)


def test_with_several_draws_the_validation_loss_is_the_same_bound_with_the_same_noise_at_every_epoch(images):
    _, held_out = hold_out(np.arange(100), 30, seed=1)
    x = torch.from_numpy(images[held_out]).flatten(1).float() / 255
    measured = []

    def measure(vae):
        noise, total = torch.Generator().manual_seed(1), 0.0
        with torch.no_grad():
            for part in x.split(6):  # 30 images, five draws each
                posterior = vae.encode(part)
                z = posterior.sample(noise, draws=5)
                total += negative_iwae_bound(vae.decode(z), part, z, posterior).loss.item()
        measured.append(total / 30)

    chosen = settings(epochs=3, validation_size=30, importance_samples=5, kl_warmup=0.7)
    history = fit(images, CONFIG, chosen, callbacks=[AtEpochEnd(measure)]).history

    assert [row["val_loss"] for row in history] == pytest.approx(measured, rel=1e-5)
    assert all(row["val_loss"] < row["val_bce"] + row["val_kld"] for row in history)


def test_fit_returns_the_weights_of_the_epoch_with_the_lowest_validation_loss(images):
    seen = []
    # The learning rate rises until the model gets worse: the best epoch is neither the first nor the last.
    chosen = settings(epochs=8, validation_size=30, schedule="one_cycle", learning_rate=0.3)
    trained = fit(images, CONFIG, chosen, callbacks=[AtEpochEnd(lambda vae: seen.append(weights(vae)))])

    validation = [row["val_loss"] for row in trained.history]
    assert trained.best_epoch == 1 + validation.index(min(validation))
    assert 1 < trained.best_epoch < len(trained.history)
    assert torch.equal(weights(trained.vae), seen[trained.best_epoch - 1])
    assert trained.losses["val_loss"] == min(validation)


def test_without_held_out_images_the_last_epoch_is_the_best(images):
    trained = fit(images, CONFIG, settings(epochs=3))

    assert trained.best_epoch == 3
    assert {"epoch": 3, **trained.losses} == trained.history[-1]


def test_hold_out_splits_the_images_without_loss_or_overlap():
    train, validation = hold_out(np.arange(100), 30, seed=1)

    assert (len(train), len(validation)) == (70, 30)
    assert sorted(np.concatenate([train, validation]).tolist()) == list(range(100))
    assert validation[:].tolist() != hold_out(np.arange(100), 30, seed=2)[1][:].tolist()
    assert validation[:].tolist() != list(range(30))


def test_hold_out_of_none_keeps_all_images_in_their_order():
    train, validation = hold_out(np.arange(100), 0, seed=1)

    assert train.tolist() == list(range(100))
    assert len(validation) == 0


@pytest.mark.parametrize("size", [100, 1_000])
def test_holding_out_all_images_is_refused(images, size):
    with pytest.raises(UserError, match=rf"train\.validation_size is {size}; it must be less than the 100"):
        fit(images, CONFIG, settings(validation_size=size))


# a person or a machine ends it


class Send(Callback):
    """Sends its own process a signal after the first chunk, and counts the chunks."""

    def __init__(self, number):
        self.number, self.chunks = number, 0

    def on_train_batch_end(self, *args):
        self.chunks += 1
        os.kill(os.getpid(), self.number)


@pytest.fixture
def _handlers():
    """Python's own handlers of signals, and afterwards those from before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_ctrl_c_in_training_is_a_keyboard_interrupt_and_works_again_afterwards(images):
    ctrl_c = Send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(images, CONFIG, settings(batch_size=2), callbacks=[ctrl_c])

    assert ctrl_c.chunks == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_stage_ends_training_after_the_current_chunk(images, number):
    end_on_signals()
    stop = Send(number)

    with pytest.raises(Stopped) as stopped:
        fit(images, CONFIG, settings(batch_size=2), callbacks=[stop])

    assert stopped.value.code == 128 + number
    assert stop.chunks == 1


# chunks


def numbered(count) -> Tensor:
    return torch.arange(count, dtype=torch.uint8)[:, None]


def in_random_order(images: Tensor) -> Chunks:
    return Chunks(images, 30, lambda: [torch.randperm(len(images))])


def test_an_epochs_chunks_are_a_permutation_of_the_images():
    torch.manual_seed(0)
    chunks = in_random_order(numbered(100))

    first, second = (torch.cat(list(chunks)).flatten().tolist() for _ in range(2))

    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first != sorted(first)


def test_unshuffled_chunks_keep_the_order():
    chunks = list(Chunks(numbered(256), chunk_size=100))

    assert [len(chunk) for chunk in chunks] == [100, 100, 56]
    assert torch.equal(torch.cat(chunks), numbered(256))


def test_pixels_lie_in_the_unit_interval():
    torch.testing.assert_close(pixels(numbered(256)).flatten(), torch.arange(256) / 255)


@pytest.mark.parametrize(("count", "chunks"), [(90, 3), (91, 4), (1, 1)])
def test_the_number_of_chunks_counts_the_smaller_last_one(count, chunks):
    images = in_random_order(numbered(count))

    assert len(images) == len(list(images)) == chunks


def test_redrawn_pixels_are_black_or_white_as_often_as_they_are_gray_and_new_at_each_draw():
    gray = torch.tensor([[0, 51, 204, 255]], dtype=torch.uint8).expand(20_000, 4)
    redraw = torch.Generator().manual_seed(0)

    first, second = (pixels(gray, redraw) for _ in range(2))

    assert set(first.unique().tolist()) == {0, 1}
    torch.testing.assert_close(first.mean(dim=0), torch.tensor([0, 0.2, 0.8, 1.0]), atol=0.02, rtol=0)
    assert not torch.equal(first, second)


def test_dynamic_binarisation_draws_anew_at_each_epoch_but_held_out_images_once(images, monkeypatch):
    seen = []

    def recorded(logits, x, *rest):
        seen.append(x)
        return negative_elbo(logits, x, *rest)

    monkeypatch.setattr("mnist_vae.training.module.negative_elbo", recorded)
    fit(images, CONFIG, settings(batch_size=100, validation_size=30), redraw_seed=5)

    first, held_out, second, held_out_again = seen
    assert (len(first), len(held_out)) == (70, 30)
    assert set(torch.cat(seen).unique().tolist()) == {0, 1}
    assert {x.numpy().tobytes() for x in first}.isdisjoint(x.numpy().tobytes() for x in second)
    assert torch.equal(held_out, held_out_again)


def test_dynamic_binarisation_is_the_same_for_equal_seeds(images):
    first, again, other = (weights(fit(images, CONFIG, settings(), redraw_seed=s).vae) for s in (5, 5, 6))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_stay_bytes_in_memory(images):
    chunks = in_random_order(torch.from_numpy(images).flatten(1))

    assert chunks.images.dtype == torch.uint8
    assert next(iter(chunks)).dtype == torch.uint8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("changes", [{}, {"importance_samples": 3, "kl_warmup": 0.5}])
def test_a_compiled_step_trains_as_the_plain_one_does(images, changes):
    plain, compiled = (fit(images, CONFIG, settings(compile=mode, **changes)).losses for mode in ("none", "default"))

    assert compiled == pytest.approx(plain, rel=0.02)
