"""A model on disk: what was saved comes back, anything else is refused, and no file can run code."""

import pickle
from pathlib import Path

import pytest
import torch

from mnist_vae.model.model_file import Checkpoint, load_model, save_model
from mnist_vae.errors import UserError
from mnist_vae.model.vae import VAE, VAEConfig


@pytest.fixture
def checkpoint():
    torch.manual_seed(0)
    return Checkpoint(VAE(VAEConfig(hidden_dim=8, latent_dim=3)), "digits", [1.5, 0.25, 2.0])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vae.pt"


class RunsCode:
    """Unpickled without care, this makes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def refusal(path):
    with pytest.raises(UserError) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "`dvc repro train` makes it again" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_was_saved_comes_back(path, checkpoint):
    save_model(path, checkpoint)
    vae, dataset, kld_per_dim = load_model(path)

    assert vae.architecture == VAEConfig(hidden_dim=8, latent_dim=3)
    assert (dataset, kld_per_dim) == ("digits", [1.5, 0.25, 2.0])
    weights = checkpoint.vae.state_dict()
    assert list(vae.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())


def test_a_loaded_model_is_in_evaluation_mode(path, checkpoint):
    save_model(path, checkpoint)

    assert not load_model(path).vae.training


def test_equal_models_give_equal_bytes_in_any_folder(tmp_path, checkpoint):
    here, there = tmp_path / "here" / "vae.pt", tmp_path / "there" / "vae.pt"
    save_model(here, checkpoint)
    save_model(there, load_model(here))

    assert here.read_bytes() == there.read_bytes()


def test_the_file_loads_without_running_code(path, checkpoint):
    save_model(path, checkpoint)

    assert set(torch.load(path, weights_only=True)) == {"format", "architecture", "weights", "dataset", "kld_per_dim"}


def test_a_missing_file_is_refused(path):
    assert "is missing" in refusal(path)


@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(path, checkpoint, left):
    save_model(path, checkpoint)
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])

    assert "damaged" in refusal(path)


def test_a_text_file_is_refused(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\n")

    assert "damaged or no model" in refusal(path)


@pytest.mark.parametrize("content", [{"format": "other/1"}, {"weights": {}}, [1, 2], torch.zeros(3)])
def test_a_torch_file_of_another_program_is_refused(path, content):
    torch.save(content, path)

    assert "no model of this project (mnist-vae/1)" in refusal(path)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": {"hidden_dim": 9, "latent_dim": 3, "input_dim": 784}},
        {"architecture": {"hidden_dim": 8, "latent_dim": 3, "layers": 2}},
        {"weights": {}},
    ],
    ids=["other sizes", "unknown size", "no weights"],
)
def test_weights_that_do_not_fit_the_architecture_are_refused(path, checkpoint, change):
    save_model(path, checkpoint)
    torch.save(torch.load(path, weights_only=True) | change, path)

    assert "damaged or no model" in refusal(path)


@pytest.mark.parametrize("key", ["architecture", "weights", "dataset", "kld_per_dim"])
def test_a_model_that_lacks_a_part_is_refused(path, checkpoint, key):
    save_model(path, checkpoint)
    content = torch.load(path, weights_only=True)
    del content[key]
    torch.save(content, path)

    assert key in refusal(path)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(path, tmp_path, save):
    trace = tmp_path / "trace"
    content = {"format": "mnist-vae/1", "weights": RunsCode(trace)}
    save(content, path)

    refusal(path)

    assert not trace.exists()
    pickle.loads(pickle.dumps(content))  # it would have
    assert trace.exists()
