"""Training on a few real images: the optimisation is the one that is meant, and its numbers mean what they say."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mnist_vae.errors import UserError
from mnist_vae.params import Train, load_params
from mnist_vae.training.fit import Images, fit, hold_out, pixels, seed_everything
from mnist_vae.model.vae import VAE, VAEConfig, negative_elbo

COMMITTED = Path(__file__).parent.parent / "params.yaml"  # the notebook's settings
ARCHITECTURE = VAEConfig(hidden_dim=8, latent_dim=2)
STANDING_STILL = {"learning_rate": 1e-30, "weight_decay": 0.0}  # no step is large enough to change a weight


def settings(**changes):
    small = {"epochs": 2, "batch_size": 16, "accelerator": "cpu"}
    return Train(**(load_params(COMMITTED).train.model_dump() | small | changes))


@pytest.fixture
def images(digits_dataset):
    return digits_dataset.x_train[::97][:100]


def first_weights(seed=1):
    """The weights that ``fit`` starts from; leaves torch's generator where ``fit`` has it then."""
    seed_everything(seed)
    return VAE(ARCHITECTURE)


def shuffled(images):
    order = torch.randperm(len(images))
    return torch.from_numpy(images).flatten(1)[order].float() / 255


def weights(vae):
    return torch.cat([parameter.detach().flatten() for parameter in vae.parameters()])


# the losses that are reported


def test_the_losses_fall(images):
    history = fit(images, ARCHITECTURE, settings(epochs=5, learning_rate=5e-3)).history

    losses = [row["loss"] for row in history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_there_is_a_row_per_epoch_numbered_from_1(images):
    history = fit(images, ARCHITECTURE, settings(epochs=3)).history

    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert all(set(row) == {"epoch", "loss", "bce", "kld"} for row in history)


def test_the_loss_is_bce_plus_weighted_kl(images):
    for row in fit(images, ARCHITECTURE, settings(kl_weight=3.0)).history:
        assert row["loss"] == pytest.approx(row["bce"] + 3 * row["kld"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [99, 2], ids=["a last batch of one", "a last chunk that is smaller"])
def test_every_image_weighs_the_same_in_the_reported_loss(images, batch_size):
    (row,) = fit(images, ARCHITECTURE, settings(epochs=1, batch_size=batch_size, **STANDING_STILL)).history

    vae = first_weights()
    with torch.no_grad():
        batches = [(x, *vae(x)) for x in shuffled(images).split(batch_size)]
        terms = [negative_elbo(logits, x, posterior) for x, logits, posterior in batches]
    loss, bce, kld = (float(sum(term)) / 100 for term in zip(*terms, strict=True))
    assert row == pytest.approx({"epoch": 1, "loss": loss, "bce": bce, "kld": kld}, rel=1e-5)


def test_each_epoch_is_handed_over_once_with_its_losses_and_the_model(images):
    epochs = []
    trained = fit(images, ARCHITECTURE, settings(epochs=3), epochs.append)

    assert [epoch.number for epoch in epochs] == [1, 2, 3]
    assert [{"epoch": epoch.number, **epoch.losses} for epoch in epochs] == trained.history
    assert all(epoch.vae is trained.vae for epoch in epochs)


def test_where_nobody_watches_each_epoch_prints_a_line(images, capsys):
    trained = fit(images, ARCHITECTURE, settings())

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

    torch.testing.assert_close(weights(fit(images, ARCHITECTURE, chosen).vae), weights(vae), rtol=1e-4, atol=1e-6)


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

    torch.testing.assert_close(weights(fit(images, ARCHITECTURE, chosen).vae), weights(vae), rtol=1e-2, atol=1e-3)


def test_equal_seeds_give_equal_bits_and_others_do_not(images):
    first, again, other = (weights(fit(images, ARCHITECTURE, settings(seed=seed)).vae) for seed in (1, 1, 2))

    assert first.numpy().tobytes() == again.numpy().tobytes()
    assert not torch.equal(first, other)


def test_the_kl_weight_trades_reconstruction_for_prior(images):
    light, heavy = (fit(images, ARCHITECTURE, settings(epochs=20, kl_weight=w)).history[-1] for w in (0.0, 20.0))

    assert light["kld"] > heavy["kld"]
    assert light["bce"] < heavy["bce"]


def test_a_constant_rate_is_constant_and_a_one_cycle_rate_rises_to_its_peak_and_falls(images, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def recorded(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    fit(images, ARCHITECTURE, settings(epochs=4, schedule="constant"))
    constant = rates.copy()
    rates.clear()
    fit(images, ARCHITECTURE, settings(epochs=4, schedule="one_cycle", learning_rate=4e-3))

    assert constant == [1e-3] * 4 * 7  # 100 images are seven batches of at most 16
    assert len(rates) == 4 * 7
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(4e-3, rel=0.02)
    assert 0 < peak < 14
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] < 4e-3 / 10
    assert rates[-1] < 4e-3 / 1000


def test_a_diverging_loss_ends_in_advice(images):
    with pytest.raises(UserError, match=r"training diverged.* lower train\.learning_rate"):
        fit(images, ARCHITECTURE, settings(learning_rate=1e6))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_accelerator_that_is_not_there_is_named(images):
    with pytest.raises(UserError, match=r"params\.yaml: train\.accelerator is 'gpu'"):
        fit(images, ARCHITECTURE, settings(accelerator="gpu"))


# early stopping


def test_training_stops_when_the_training_loss_no_longer_improves_enough(images):
    improving_too_little = settings(epochs=20, patience=3, min_delta=1e9)

    assert len(fit(images, ARCHITECTURE, improving_too_little).history) == 1 + 3


def test_training_goes_on_while_the_loss_improves(images):
    assert len(fit(images, ARCHITECTURE, settings(epochs=8, patience=0)).history) == 8


def test_with_images_held_out_early_stopping_watches_their_loss(images):
    chosen = settings(epochs=20, patience=2, validation_size=30, learning_rate=1e-2)
    _, held_out = hold_out(torch.arange(100), 30, seed=1)
    opposite = np.zeros_like(images)
    opposite[held_out] = 255  # the better the others are learnt, the worse these fit

    history = fit(opposite, ARCHITECTURE, chosen).history

    assert len(history) == 1 + 2
    assert history[2]["loss"] < history[1]["loss"] < history[0]["loss"]
    assert history[2]["val_loss"] > history[1]["val_loss"] > history[0]["val_loss"]


# held-out images


def test_held_out_images_are_measured_but_not_trained_on(images):
    chosen = settings(validation_size=30)
    _, held_out = hold_out(torch.arange(100), 30, seed=1)
    others_blank = images.copy()
    others_blank[held_out] = 0

    first, second = fit(images, ARCHITECTURE, chosen), fit(others_blank, ARCHITECTURE, chosen)

    assert torch.equal(weights(first.vae), weights(second.vae))
    assert first.history[-1]["loss"] == second.history[-1]["loss"]
    assert first.history[-1]["val_loss"] != second.history[-1]["val_loss"]


def test_the_noise_of_validation_is_the_same_at_every_epoch(images):
    history = fit(images, ARCHITECTURE, settings(epochs=3, validation_size=30, **STANDING_STILL)).history

    assert len({row["val_loss"] for row in history}) == 1
    assert len({row["loss"] for row in history}) == 3


def test_the_validation_loss_is_that_of_the_model_at_the_epochs_end_per_image(images, monkeypatch):
    monkeypatch.setattr("mnist_vae.training.fit.VALIDATION_BATCH", 20)  # 30 images are a batch and a half
    _, held_out = hold_out(torch.arange(100), 30, seed=1)
    x = torch.from_numpy(images[held_out]).flatten(1).float() / 255
    measured = []

    def measure(epoch):
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            terms = [negative_elbo(logits, part, q) for part in x.split(20) for logits, q in [epoch.vae(part, noise)]]
        measured.append(float(sum(term.loss for term in terms)) / 30)

    history = fit(images, ARCHITECTURE, settings(epochs=3, validation_size=30), measure).history

    assert [row["val_loss"] for row in history] == pytest.approx(measured, rel=1e-5)
    assert all(row["val_loss"] == pytest.approx(row["val_bce"] + row["val_kld"]) for row in history)


def test_holding_out_splits_the_images_without_loss_or_overlap():
    train, validation = hold_out(torch.arange(100), 30, seed=1)

    assert (len(train), len(validation)) == (70, 30)
    assert sorted(torch.cat([train, validation]).tolist()) == list(range(100))
    assert not torch.equal(validation, hold_out(torch.arange(100), 30, seed=2)[1])
    assert validation.tolist() != list(range(30))


def test_holding_out_none_keeps_all_in_their_order():
    train, validation = hold_out(torch.arange(100), 0, seed=1)

    assert torch.equal(train, torch.arange(100))
    assert len(validation) == 0


@pytest.mark.parametrize("size", [100, 1_000])
def test_holding_out_all_images_is_refused(images, size):
    with pytest.raises(UserError, match=rf"train\.validation_size is {size}; it must be less than the 100"):
        fit(images, ARCHITECTURE, settings(validation_size=size))


def test_ctrl_c_stays_what_it_is(images):
    def interrupt(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(images, ARCHITECTURE, settings(), on_epoch=interrupt)


# chunks


def numbered(count) -> Tensor:
    return torch.arange(count, dtype=torch.uint8)[:, None]


def test_an_epochs_chunks_are_a_permutation_of_the_images():
    torch.manual_seed(0)
    chunks = Images(numbered(100), chunk_size=30, shuffle=True)

    first, second = (torch.cat(list(chunks)).flatten().tolist() for _ in range(2))

    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first != sorted(first)


def test_unshuffled_chunks_keep_the_order():
    chunks = list(Images(numbered(256), chunk_size=100, shuffle=False))

    assert [len(chunk) for chunk in chunks] == [100, 100, 56]
    assert torch.equal(torch.cat(chunks), numbered(256))


def test_pixels_lie_in_the_unit_interval():
    torch.testing.assert_close(pixels(numbered(256)).flatten(), torch.arange(256) / 255)


@pytest.mark.parametrize(("count", "chunks"), [(90, 3), (91, 4), (1, 1)])
def test_the_number_of_chunks_counts_the_smaller_last_one(count, chunks):
    images = Images(numbered(count), chunk_size=30, shuffle=True)

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

    monkeypatch.setattr("mnist_vae.training.fit.negative_elbo", recorded)
    fit(images, ARCHITECTURE, settings(batch_size=100, validation_size=30), redraw_seed=5)

    first, held_out, second, held_out_again = seen
    assert (len(first), len(held_out)) == (70, 30)
    assert set(torch.cat(seen).unique().tolist()) == {0, 1}
    assert {x.numpy().tobytes() for x in first}.isdisjoint(x.numpy().tobytes() for x in second)
    assert torch.equal(held_out, held_out_again)


def test_dynamic_binarisation_is_the_same_for_equal_seeds(images):
    first, again, other = (weights(fit(images, ARCHITECTURE, settings(), redraw_seed=s).vae) for s in (5, 5, 6))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_images_stay_bytes_in_memory(images):
    chunks = Images(torch.from_numpy(images).flatten(1), chunk_size=30, shuffle=True)

    assert chunks.images.dtype == torch.uint8
    assert next(iter(chunks)).dtype == torch.uint8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_trains_as_the_plain_one_does(images):
    plain, compiled = (fit(images, ARCHITECTURE, settings(compile=mode)).losses for mode in ("none", "default"))

    assert compiled == pytest.approx(plain, rel=0.02)
