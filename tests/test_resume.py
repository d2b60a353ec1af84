"""A training that is interrupted, at whatever moment, and resumed ends with the bits of one that nothing disturbed."""

import io
import math
import multiprocessing
import random
import signal
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mnist_vae.errors import UserError
from mnist_vae.training import data_module
from mnist_vae.training.checkpoints import BEST, LAST, load_checkpoint, path_of, seal
from mnist_vae.training.fit import fit
from tests.training import CONFIG, Recorder, settings, weights

CHUNK = 4  # mini-batches of 16: 100 images are two chunks per epoch, and a training can be interrupted between them
CASES = {
    "gray, constant rate": {"epochs": 2},
    "redrawn, one cycle": {"epochs": 2, "schedule": "one_cycle", "redraw_seed": 5},
    "stopped early": {"epochs": 5, "patience": 1, "min_delta": 1e6},
    "held out, best before last": {"epochs": 3, "learning_rate": 0.3, "validation_size": 30},
    "several draws, rising KL weight": {"epochs": 3, "importance_samples": 3, "kl_warmup": 0.8, "validation_size": 30},
    "all at once": {
        "epochs": 5,
        "kl_warmup": 0.3,
        "schedule": "one_cycle",
        "redraw_seed": 5,
        "validation_size": 30,
        "patience": 1,
        "min_delta": 1e6,
    },
}
HELD_OUT = CASES["held out, best before last"]
KILLS = 4


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(data_module, "CHUNK", CHUNK)


@pytest.fixture(scope="module")
def images(digits_dataset):
    return digits_dataset.x_train[::97][:100]


def train(images, case, folder=None, **more):
    changes = dict(case)
    redraw_seed = changes.pop("redraw_seed", None)
    return fit(images, CONFIG, settings(**changes), redraw_seed=redraw_seed, checkpoints=folder, **more)


def outcome(trained):
    """All that a training results in, to the last bit."""
    return weights(trained.vae).numpy().tobytes(), trained.history, trained.best_epoch


# interrupted at each moment


class Interruption(Exception):  # noqa: N818  it is not an error
    """What ends a training early."""


class Moments(Callback):
    """Counts the moments of a training, and interrupts it at the one with a given number, from 1."""

    def __init__(self, interrupt_at=0):
        self.interrupt_at, self.passed = interrupt_at, []

    def at(self, moment):
        self.passed.append(moment)
        if len(self.passed) == self.interrupt_at:
            raise Interruption(moment)

    def on_train_start(self, *args):
        self.at("training starts")

    def on_train_batch_end(self, *args):
        self.at("a chunk ends")

    def on_train_epoch_end(self, *args):
        self.at("an epoch ends")

    def on_train_end(self, *args):
        self.at("training ends")

    @contextmanager
    def in_files(self, monkeypatch):
        """Count the moments at which a checkpoint is written, too."""
        save, write, replace = torch.save, Path.write_bytes, Path.replace

        def saved(*args, **options):
            self.at("a checkpoint is made")
            return save(*args, **options)

        def written(path, content):
            write(path, content[: len(content) // 2])
            self.at(f"{path.name} is half written")
            return write(path, content)

        def replaced(path, target):
            self.at(f"{path.name} is written beside its place")
            replace(path, target)
            self.at(f"{path.name} is in its place")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", saved)
            patch.setattr(Path, "write_bytes", written)
            patch.setattr(Path, "replace", replaced)
            yield


class AtEpoch(Callback):
    """Interrupts a training when an epoch, counted from 1, starts."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, module):
        if module.current_epoch + 1 == self.epoch:
            raise Interruption


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_fit_interrupted_at_any_moment_and_resumed_ends_with_the_same_bits(images, case, tmp_path, monkeypatch):
    expected, whole = Recorder(), Moments()
    with whole.in_files(monkeypatch):
        undisturbed = train(images, case, tmp_path / "undisturbed", logger=expected, callbacks=[whole])
    assert "last.ckpt is half written" in whole.passed

    for number, moment in enumerate(whole.passed, 1):
        folder, moments, logger = tmp_path / str(number), Moments(number), Recorder()
        with moments.in_files(monkeypatch), pytest.raises(Interruption, match=moment):
            train(images, case, folder, logger=logger, callbacks=[moments])
        behind = moments.passed.count("last.ckpt is in its place")

        resumed = train(images, case, folder, logger=logger)

        where = f"interrupted when {moment}, in epoch {behind + 1}"
        assert outcome(resumed) == outcome(undisturbed), where
        assert resumed.resumed_after == behind, where
        assert dict(logger.records) == dict(expected.records), where
        assert sorted({step for step, _ in logger.records}) == list(range(1, len(undisturbed.history) + 1)), where


def test_cases_end_as_they_are_meant_to(images):
    trained = {name: train(images, case) for name, case in CASES.items()}

    assert len(trained["stopped early"].history) == 2
    assert len(trained["all at once"].history) == 3  # the first of them while the KL weight rises
    assert trained["held out, best before last"].best_epoch == 2
    assert trained["all at once"].history != trained["redrawn, one cycle"].history


def test_fit_after_the_last_epoch_trains_no_further(images, tmp_path):
    first = train(images, HELD_OUT, tmp_path)
    moments = Moments()

    again = train(images, HELD_OUT, tmp_path, callbacks=[moments])

    assert moments.passed == []
    assert outcome(again) == outcome(first)
    assert (first.resumed_after, again.resumed_after) == (0, 3)


def test_fit_interrupted_again_and_again_ends_with_the_same_bits(images, tmp_path):
    case = CASES["redrawn, one cycle"] | {"epochs": 6}
    for epoch in range(2, 7):
        with pytest.raises(Interruption):
            train(images, case, tmp_path, callbacks=[AtEpoch(epoch)])

    resumed = train(images, case, tmp_path)

    assert resumed.resumed_after == 5
    assert outcome(resumed) == outcome(train(images, case))


def test_fit_says_where_it_resumes(images, tmp_path, capsys):
    train(images, {"epochs": 2}, tmp_path)
    assert "resuming" not in capsys.readouterr().err

    train(images, {"epochs": 2}, tmp_path)
    assert "resuming after epoch 2 of at most 2" in capsys.readouterr().err


def test_fit_resumes_where_the_folder_of_checkpoints_has_been_moved(images, tmp_path):
    with pytest.raises(Interruption):
        train(images, HELD_OUT, tmp_path / "before", callbacks=[AtEpoch(3)])
    (tmp_path / "before").rename(tmp_path / "after")

    resumed = train(images, HELD_OUT, tmp_path / "after")

    assert resumed.resumed_after == 2
    assert outcome(resumed) == outcome(train(images, HELD_OUT))
    assert not (tmp_path / "before").exists()


@pytest.mark.parametrize("name", ["a b", "größe", "#1", "100%", "what?", "c:d", "{epoch}", "a::b"])
def test_fit_keeps_checkpoints_in_a_folder_of_any_name(images, tmp_path, name):
    folder = tmp_path / name
    train(images, HELD_OUT, folder)

    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert train(images, HELD_OUT, folder).resumed_after == 3


# killed


def child(images, case, folder, parent):
    """A process that trains, tells its parent of each chunk, and at last of the outcome."""

    class Report(Callback):
        def on_train_batch_end(self, *args):
            parent.send(None)

    torch.set_num_threads(1)
    data_module.CHUNK = CHUNK
    parent.send(outcome(train(images, case, folder, callbacks=[Report()])))


def start(*args):
    """The process of ``child``, and the connection on which it reports."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["mnist_vae.training.fit"])  # the seconds of importing once, not per process
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=child, args=(*args, theirs))
    process.start()
    theirs.close()
    return process, ours


def last_report(reports):
    """The last thing that a process reported before it ended."""
    report = None
    while True:
        try:
            report = reports.recv()
        except EOFError:
            return report


def test_fit_killed_at_random_moments_and_resumed_ends_with_the_same_bits(images, tmp_path):
    # More epochs than can be over before the last kill.
    case = {"epochs": 40, "patience": 40, "schedule": "one_cycle", "redraw_seed": 5, "validation_size": 30}
    moments = random.Random(1)

    for _ in range(KILLS):
        process, reports = start(images, case, tmp_path / "killed")
        for _ in range(moments.randint(1, 6)):
            reports.recv()
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL

    (resumed, resumed_reports), (undisturbed, reports) = (start(images, case, tmp_path / x) for x in ("killed", "not"))
    expected = last_report(reports)
    assert expected is not None
    assert last_report(resumed_reports) == expected
    resumed.join()
    undisturbed.join()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["best.ckpt", "last.ckpt"]


# damaged


def emptied(content):
    return b""


def cut_off(content):
    return content[:-100]


def with_a_flipped_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def zeros(content):
    return bytes(len(content))


def another_zip(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    return file.getvalue()


@pytest.mark.parametrize("damage", [emptied, cut_off, with_a_flipped_bit, zeros, another_zip])
@pytest.mark.parametrize("name", [LAST, BEST])
def test_fit_starts_afresh_where_a_checkpoint_is_damaged(images, tmp_path, capsys, name, damage):
    with pytest.raises(Interruption):
        train(images, HELD_OUT, tmp_path, callbacks=[AtEpoch(3)])
    path = path_of(tmp_path, name)
    path.write_bytes(damage(path.read_bytes()))

    trained = train(images, HELD_OUT, tmp_path)

    assert "is damaged: training starts again from its first epoch" in capsys.readouterr().err
    assert trained.resumed_after == 0
    assert outcome(trained) == outcome(train(images, HELD_OUT))


def test_fit_starts_afresh_where_the_best_checkpoint_is_missing(images, tmp_path):
    train(images, HELD_OUT, tmp_path)
    path_of(tmp_path, BEST).unlink()

    trained = train(images, HELD_OUT, tmp_path)

    assert trained.resumed_after == 0
    assert outcome(trained) == outcome(train(images, HELD_OUT))


class Touch:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_fit_does_not_run_the_code_in_a_checkpoint(images, tmp_path):
    folder, made = tmp_path / "checkpoints", tmp_path / "made"
    folder.mkdir()
    file = io.BytesIO()
    torch.save({"history": [], "generators": Touch(made)}, file)
    path_of(folder, LAST).write_bytes(seal(file))
    torch.load(path_of(folder, LAST), weights_only=False)
    assert made.exists()  # so it would run
    made.unlink()

    assert train(images, {"epochs": 1}, folder).resumed_after == 0
    assert not made.exists()


# diverged


def numbers(content):
    """All numbers in a part of a checkpoint."""
    match content:
        case Tensor():
            yield from content.flatten().tolist()
        case dict():
            yield from numbers(list(content.values()))
        case list() | tuple():
            for part in content:
                yield from numbers(part)
        case int() | float():
            yield content


def is_finite(checkpoint):
    content = load_checkpoint(checkpoint)
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "history")
    return all(map(math.isfinite, numbers([content[part] for part in parts])))


@pytest.mark.parametrize("validation_size", [0, 30])
def test_fit_names_epoch_and_step_where_the_loss_diverges_and_keeps_the_last_finite_checkpoint(
    images, tmp_path, validation_size
):
    # A step of 1e6 in all weights: the next loss, the first of epoch 2, is beyond what Adam can square.
    case = {"epochs": 3, "learning_rate": 1e6, "batch_size": 100, "validation_size": validation_size}
    logger = Recorder()

    with pytest.raises(UserError, match=r"^training diverged at epoch 2, step 1 of 1: .* lower train\.learning_rate"):
        train(images, case, tmp_path, logger=logger)

    assert all(map(is_finite, tmp_path.glob("*.ckpt")))
    assert [row["epoch"] for row in load_checkpoint(path_of(tmp_path, LAST))["history"]] == [1]
    assert [step for step, _ in logger.records] == [1]


def test_fit_names_the_step_of_the_first_loss_that_is_not_finite(images, tmp_path):
    with pytest.raises(UserError, match=r"^training diverged at epoch 1, step 4 of 7: the loss is not finite;"):
        train(images, {"learning_rate": 1e6}, tmp_path)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("learning_rate", "validation_size", "what"),
    [(1e39, 0, "a weight or a moment of Adam"), (1e18, 30, "the validation loss")],
)
def test_fit_writes_no_checkpoint_of_an_epoch_that_ends_in_numbers_that_are_not_finite(
    images, tmp_path, learning_rate, validation_size, what
):
    # Larger than params.yaml allows, so that the only step of the epoch does it; its loss is from before it.
    chosen = settings(batch_size=100, validation_size=validation_size).model_copy(
        update={"learning_rate": learning_rate}
    )
    logger = Recorder()

    with pytest.raises(UserError, match=f"^training diverged at epoch 1, step 1 of 1: {what} is not finite;"):
        fit(images, CONFIG, chosen, checkpoints=tmp_path, logger=logger)

    assert list(tmp_path.iterdir()) == []
    assert logger.records == []
