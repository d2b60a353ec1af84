"""Data sets larger than the shuffle window, or than the memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mnist_vae.data.binarization import Binarized
from mnist_vae.data.dataset import Selection, hold_out
from mnist_vae.training import data_module
from mnist_vae.training.data_module import Chunks, in_equal_parts, windowed_order
from mnist_vae.training.fit import fit
from tests.training import CONFIG, settings, weights


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, size=(100, 28, 28), dtype=np.uint8)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(data_module, "SHUFFLE_BLOCK", 8)


def positions(*arguments):
    return torch.cat([*windowed_order(*arguments)]).tolist()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("count", "window"), [(100, 32), (100, 1), (96, 32), (7, 32), (1, 8)])
def test_a_windowed_order_has_every_image_once(count, window):
    assert sorted(positions(count, window, 1, 0)) == list(range(count))


@pytest.mark.usefixtures("small_blocks")
def test_a_windowed_order_is_a_function_of_seed_and_epoch():
    orders = [positions(100, 32, seed, epoch) for seed, epoch in [(1, 0), (1, 0), (1, 1), (2, 0)]]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.usefixtures("small_blocks")
def test_a_window_mixes_whole_blocks_from_all_over_the_file():
    for part in windowed_order(800, 80, 1, 0):
        blocks = part.numpy() // 8
        assert (len(part), len(np.unique(blocks))) == (80, 10)
        assert np.ptp(np.unique(blocks)) > 20  # from far apart
        assert (np.diff(blocks) != 0).sum() > 50  # and not one after another


def test_parts_of_an_order_become_parts_of_equal_size():
    parts = [torch.arange(0, 10), torch.arange(10, 11), torch.arange(11, 11), torch.arange(11, 25)]
    equal = [part.tolist() for part in in_equal_parts(parts, 4)]
    assert [len(part) for part in equal] == [4, 4, 4, 4, 4, 4, 1]
    assert [position for part in equal for position in part] == list(range(25))


def test_chunks_of_a_source_are_those_of_a_tensor(images):
    order = [torch.randperm(100)]
    for images_of in (images, Selection(images, np.arange(100)[::-1].copy()), Binarized(images, 3)):
        tensor = torch.from_numpy(images_of[:].copy()).flatten(1)
        for how in (None, lambda: order):
            pairs = zip(Chunks(images_of, 30, how), Chunks(tensor, 30, how), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("redraw_seed", [None, 5])
@pytest.mark.parametrize("held_out", [0, 30])
def test_training_from_a_file_gives_the_bits_of_training_in_memory(images, monkeypatch, redraw_seed, held_out):
    changes = {"validation_size": held_out}
    in_memory = fit(images, CONFIG, settings(**changes), redraw_seed=redraw_seed)
    monkeypatch.setattr(data_module, "IN_MEMORY", 0)
    from_file = fit(images, CONFIG, settings(**changes), redraw_seed=redraw_seed)

    assert torch.equal(weights(from_file.vae), weights(in_memory.vae))
    assert from_file.history == in_memory.history


@pytest.mark.usefixtures("small_blocks")
def test_a_window_as_large_as_the_set_changes_nothing_and_a_smaller_one_does(images):
    default, equal, smaller = (fit(images, CONFIG, settings(shuffle_window=n)) for n in (1_000_000, 100, 99))

    assert torch.equal(weights(default.vae), weights(equal.vae))
    assert not torch.equal(weights(default.vae), weights(smaller.vae))


@pytest.mark.usefixtures("small_blocks")
def test_training_beyond_the_window_resumes_with_the_same_bits(images, tmp_path):
    whole = fit(images, CONFIG, settings(epochs=4, shuffle_window=32))
    fit(images, CONFIG, settings(epochs=2, shuffle_window=32), checkpoints=tmp_path)
    resumed = fit(images, CONFIG, settings(epochs=4, shuffle_window=32), checkpoints=tmp_path)

    assert resumed.resumed_after == 2
    assert torch.equal(weights(resumed.vae), weights(whole.vae))


@pytest.mark.usefixtures("small_blocks")
def test_each_epoch_beyond_the_window_has_an_order_of_its_own(images, monkeypatch):
    epochs = []

    def recorded(count, window, seed, epoch):
        epochs.append((count, window, seed, epoch))
        return windowed_order(count, window, seed, epoch)

    monkeypatch.setattr(data_module, "windowed_order", recorded)
    fit(images, CONFIG, settings(epochs=3, shuffle_window=32, validation_size=10))

    assert epochs == [(90, 32, 1, 0), (90, 32, 1, 1), (90, 32, 1, 2)]


def test_images_beyond_the_window_are_read_as_they_lie_in_the_file(images):
    train, held_out = hold_out(images, 30, seed=1)
    module = data_module.ImagesDataModule(
        images, batch_size=16, validation_size=30, seed=1, redraw_seed=None, shuffle_window=32
    )

    assert module.train_images.positions.tolist() == sorted(train.positions)
    assert module.validation_images.positions.tolist() == held_out.positions.tolist()


TRAIN_LARGE = """
import resource, sys
from pathlib import Path

import numpy as np

from mnist_vae.data.binarization import binarize_dataset
from mnist_vae.data.dataset import load_dataset
from mnist_vae.model.latent import encode
from mnist_vae.training import data_module
from mnist_vae.training.fit import fit
from tests.training import CONFIG, settings

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData"))

fit(np.zeros((64, 28, 28), np.uint8), CONFIG, settings(epochs=1))  # what libraries take once
room = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (anonymous() + room,) * 2)
try:
    np.ones(room + 2**20, np.uint8)
except MemoryError:
    pass
else:
    sys.exit("the limit does not hold")
data_module.IN_MEMORY = 2**20  # in proportion
dataset = load_dataset(sys.argv[1])
measured = binarize_dataset(dataset, sys.argv[3], 1)
large = settings(epochs=1, batch_size=512, shuffle_window=20_000, validation_size=1_000)
trained = fit(measured.x_train, CONFIG, large)
assert len(encode(trained.vae, measured.x_train).mean) == len(dataset.x_train)
print(dataset.about["train_images"], measured.about["test_images"])
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """200,000 training images, 157 MB, that were never in memory together."""
    from mnist_vae.data.dataset import Dataset, save_dataset

    folder = tmp_path_factory.mktemp("large") / "dataset"
    tile = np.random.default_rng(0).integers(0, 256, size=(2_000, 28, 28), dtype=np.uint8)
    repeated = Selection(tile, np.arange(200_000) % 2_000)
    save_dataset(folder, Dataset("synthetic/", repeated, None, tile[:100], None))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and limits memory as Linux does")
@pytest.mark.parametrize("binarize", ["none", "static"])
def test_training_takes_less_memory_than_its_images(large, binarize):
    """Loading, hashing, holding out, binarising, training and encoding within 100 MB; the images are 157 MB."""
    command = [sys.executable, "-c", TRAIN_LARGE, large, str(100 * 2**20), binarize]
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=env)

    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["200000", "100"]
