"""A model on disk: what was saved comes back, anything else is refused, and no file can run code."""

import hashlib
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from mnist_vae.errors import UserError
from mnist_vae.model import model_file
from mnist_vae.model.model_file import SavedModel, load_model, save_model
from mnist_vae.model.vae import VAE, VAEConfig

CONFIG = VAEConfig(hidden_dims=(8, 5), latent_dim=3, activation="tanh")
WRITTEN = {"hidden_dims": [8, 5], "latent_dim": 3, "input_dim": 784, "activation": "tanh"}  # as JSON


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SavedModel(VAE(CONFIG), "digits", [1.5, 0.25, 2.0], "0123456789abcdef")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vae.safetensors"


def refusal(path):
    with pytest.raises(UserError) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "`dvc repro train` makes it again" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def about(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["mnist-vae"])


def forge(path, weights=None, **changes):
    """Write the file anew with other weights or metadata, and a digest that fits them; None removes an entry."""
    weights = load_file(path) if weights is None else weights
    described = {name: value for name, value in (about(path) | changes).items() if value is not None}
    described["sha256"] = model_file._digest(described, weights)
    save_file(weights, path, metadata={"mnist-vae": json.dumps(described)})


# what was saved


def test_load_model_gives_back_what_save_model_wrote(path, model):
    save_model(path, model)
    vae, dataset, kld_per_dim, fingerprint = load_model(path)

    assert vae.config == CONFIG
    assert (dataset, kld_per_dim, fingerprint) == ("digits", [1.5, 0.25, 2.0], "0123456789abcdef")
    weights = model.vae.state_dict()
    assert list(vae.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())


def test_load_model_takes_a_text_for_a_path(path, model):
    save_model(path, model)

    assert load_model(str(path)).vae.config == CONFIG


def test_load_model_gives_a_model_in_evaluation_mode_that_can_be_trained_on(path, model):
    save_model(path, model)
    vae = load_model(path).vae

    assert not vae.training
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in vae.parameters())


def test_save_model_writes_equal_bytes_for_equal_models_in_any_folder(tmp_path, model):
    here, there = tmp_path / "here" / "vae.safetensors", tmp_path / "there" / "vae.safetensors"
    save_model(here, model)
    save_model(there, load_model(here))

    assert here.read_bytes() == there.read_bytes()


def test_save_model_describes_the_model_in_the_metadata(path, model):
    save_model(path, model)

    described = about(path)
    assert described.pop("sha256")
    versions = described.pop("versions")
    assert versions.keys() == {"torch", "safetensors"}
    assert "+" not in versions["torch"]
    assert described == {
        "format": "mnist-vae/3",
        "config": WRITTEN,
        "dataset": "digits",
        "kld_per_dim": [1.5, 0.25, 2.0],
        "fingerprint": "0123456789abcdef",
    }


def test_save_model_writes_a_file_that_safetensors_alone_can_open(path, model):
    save_model(path, model)

    weights = load_file(path)

    expected = model.vae.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


# files that are none of ours


def test_load_model_refuses_a_missing_file(path):
    assert "is missing" in refusal(path)


def test_load_model_names_a_file_that_cannot_be_read(tmp_path):
    assert f"{tmp_path} cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.99])
def test_load_model_refuses_a_truncated_file(path, model, left):
    save_model(path, model)
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])

    assert "damaged" in refusal(path)


def test_load_model_refuses_a_text_file(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\n")

    assert "damaged or not what this project writes" in refusal(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"mnist-vae": "{}"},
        {"mnist-vae": "[]"},
        {"mnist-vae": '{"format": "mnist-vae/1"}'},
        {"mnist-vae": "not JSON"},
        {"mnist-vae": "[" * 100_000},
    ],
)
def test_load_model_refuses_a_file_of_another_program(path, metadata):
    save_file({"weight": torch.zeros(3)}, path, metadata=metadata)

    assert "damaged or not what this project writes" in refusal(path)


class RunsCode:
    """Unpickled without care, this makes a file."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_load_model_refuses_a_file_that_would_run_code_and_runs_nothing(path, tmp_path, save):
    trace = tmp_path / "trace"
    content = {"format": "mnist-vae/3", "weights": RunsCode(trace)}
    save(content, path)

    refusal(path)

    assert not trace.exists()
    pickle.loads(pickle.dumps(content))  # it would have
    assert trace.exists()


# files that were ours


def test_load_model_notices_a_flipped_bit_in_a_weight(path, model):
    save_model(path, model)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    assert "its weights or its metadata are not those that were written" in refusal(path)


@pytest.mark.parametrize(("old", "new"), [(b"digits", b"digitz"), (b"0.25", b"0.52"), (b"0123456", b"1023456")])
def test_load_model_notices_a_changed_byte_in_the_metadata(path, model, old, new):
    save_model(path, model)
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))

    assert "its weights or its metadata are not those that were written" in refusal(path)


@pytest.mark.parametrize(
    "config",
    [
        WRITTEN | {"hidden_dims": [8, 6]},
        WRITTEN | {"hidden_dims": [5, 8]},
        WRITTEN | {"hidden_dims": [8]},
        WRITTEN | {"hidden_dims": [8, 5, 5]},
        WRITTEN | {"input_dim": 783},
        WRITTEN | {"hidden_dims": [2**20] * 8, "input_dim": 2**14},
    ],
    ids=["wider", "reversed", "a layer less", "a layer more", "another input", "sizes that ask for 66 TB"],
)
def test_load_model_refuses_weights_that_do_not_fit_the_config(path, model, config):
    save_model(path, model)
    forge(path, config=config)

    assert "its weights do not fit its config" in refusal(path)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_dim": 8, "latent_dim": 3, "input_dim": 784},
        WRITTEN | {"layers": 2},
        {"hidden_dims": [8, 5], "latent_dim": 3},
        WRITTEN | {"latent_dim": 3.0},
        WRITTEN | {"latent_dim": True},
        WRITTEN | {"input_dim": 0},
        WRITTEN | {"input_dim": 10**20},
        WRITTEN | {"hidden_dims": 8},
        WRITTEN | {"hidden_dims": []},
        WRITTEN | {"hidden_dims": [8] * 9},
        WRITTEN | {"hidden_dims": [8, 0]},
        WRITTEN | {"hidden_dims": [8, [5]]},
        WRITTEN | {"activation": "gelu"},
        WRITTEN | {"activation": ["tanh"]},
        "small",
        None,
    ],
)
def test_load_model_refuses_a_config_that_makes_no_model(path, model, config):
    save_model(path, model)
    forge(path, config=config)

    assert "its config is" in refusal(path)


@pytest.mark.parametrize(
    "klds",
    [[1.5, 0.25], [1.5, 0.25, 2.0, 1.0], [1.5, 0.25, float("nan")], [1.5, 0.25, float("inf")], [1.5, 0.25, "2"], None],
    ids=["too few", "too many", "NaN", "infinite", "text", "none"],
)
def test_load_model_refuses_a_kld_per_dim_that_is_not_one_number_for_each_dimension(path, model, klds):
    save_model(path, model)
    forge(path, kld_per_dim=klds)

    assert "its kld_per_dim is not one finite number for each latent dimension" in refusal(path)


@pytest.mark.parametrize("entry", ["dataset", "fingerprint"])
@pytest.mark.parametrize("value", [None, 3])
def test_load_model_refuses_a_model_that_does_not_say_what_it_was_made_from(path, model, entry, value):
    save_model(path, model)
    forge(path, **{entry: value})

    assert "it does not name its data set and its fingerprint" in refusal(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_model_refuses_weights_that_are_not_finite(path, model, value):
    save_model(path, model)
    weights = load_file(path)
    weights["decoder.4.bias"][7] = value
    forge(path, weights)

    assert "a weight is not finite" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64, torch.int32])
def test_load_model_refuses_weights_of_another_type(path, model, dtype):
    save_model(path, model)
    forge(path, {name: weight.to(dtype) for name, weight in load_file(path).items()})

    assert "its weights do not fit its config" in refusal(path)


@pytest.mark.parametrize("change", [lambda weights: weights.pop("decoder.4.bias"), lambda weights: weights.clear()])
def test_load_model_refuses_a_model_that_lacks_weights(path, model, change):
    save_model(path, model)
    weights = load_file(path)
    change(weights)
    forge(path, weights)

    assert "its weights do not fit its config" in refusal(path)


def test_load_model_refuses_a_header_that_claims_more_than_its_file_holds(path, model):
    save_model(path, model)
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header["decoder.0.weight"] |= {"shape": [2**17, 2**17], "data_offsets": [0, 2**36]}
    claimed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(claimed)) + claimed + content[8 + size :])

    assert "damaged" in refusal(path)


def test_save_model_digest_is_that_of_metadata_and_weights(path, model):
    save_model(path, model)

    described, weights = about(path), load_file(path)
    recorded = described.pop("sha256")
    content = b"".join(weights[name].numpy().tobytes() for name in sorted(weights))
    assert recorded == hashlib.sha256(json.dumps(described, sort_keys=True).encode() + content).hexdigest()


def test_model_files_are_no_zip_archives_and_so_hold_no_pickle(path, model):
    save_model(path, model)

    assert not zipfile.is_zipfile(path)
