"""A trained VAE as a file that anyone may open: safetensors, with what the weights mean as metadata.

Nothing in such a file can run. The metadata are one entry, ``mnist-vae``, a JSON object: safetensors writes several
entries in an order that changes from run to run, and equal models must be equal bytes.
"""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from mnist_vae.files import read_or_refuse, write_bytes
from mnist_vae.model.vae import ACTIVATIONS, VAE, VAEConfig

FORMAT = "mnist-vae/3"
ENTRY = "mnist-vae"
LARGEST = 2**20  # of any size in a config: beyond it a file is damaged, not a model
DEEPEST = 8  # hidden layers on a side: likewise
REMEDY = "`dvc repro train` makes it again, `dvc checkout` restores the last one"


class SavedModel(NamedTuple):
    """A model and what it was made from."""

    vae: VAE
    dataset: str  # the title of what it was trained on
    kld_per_dim: list[float]  # mean over the training images, nats, (Z,)
    fingerprint: str  # of the training, see mnist_vae/fingerprint.py


def save_model(path: Path, model: SavedModel) -> None:
    """Write weights and metadata; equal models give equal bytes."""
    about: dict[str, Any] = {
        "format": FORMAT,
        "config": asdict(model.vae.config),
        "dataset": model.dataset,
        "kld_per_dim": model.kld_per_dim,
        "fingerprint": model.fingerprint,
        "versions": {"torch": torch.__version__.partition("+")[0], "safetensors": safetensors.__version__},
    }
    about["sha256"] = _digest(about, model.vae.state_dict())
    write_bytes(path, save(model.vae.state_dict(), metadata={ENTRY: json.dumps(about, sort_keys=True)}))


def load_model(path: Path | str) -> SavedModel:
    """Read what ``save_model`` wrote; the model is in evaluation mode, on the CPU.

    Names, shapes and types are checked before memory is taken, and weights must be finite.

    Raises:
        UserError: the file is missing, damaged, or some other program's.
    """
    return read_or_refuse(Path(path), _read, REMEDY, (safetensors.SafetensorError, ValueError, RecursionError))


def _read(path: Path) -> SavedModel:
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        about = _checked_metadata((file.metadata() or {}).get(ENTRY))
        config = about["config"]
        with torch.device("meta"):  # shapes without memory
            vae = VAE(VAEConfig(**config | {"hidden_dims": tuple(config["hidden_dims"])}))  # JSON has no tuples
        expected = {name: ("F32", list(weight.shape)) for name, weight in vae.state_dict().items()}
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        if {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()} != expected:
            raise ValueError(f"its weights do not fit its config, {config}")
        weights = {name: file.get_tensor(name) for name in expected}
    if _digest(about, weights) != about.get("sha256"):
        raise ValueError("its weights or its metadata are not those that were written")
    if not all(bool(weight.isfinite().all()) for weight in weights.values()):
        raise ValueError("a weight is not finite")
    vae.load_state_dict(weights, assign=True)
    return SavedModel(vae.eval(), about["dataset"], about["kld_per_dim"], about["fingerprint"])


def _digest(about: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """The SHA-256 of the metadata, without their own ``sha256``, and of the weights' bytes in the order of names."""
    described = {name: value for name, value in about.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for _, weight in sorted(weights.items()):
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _checked_metadata(text: str | None) -> dict[str, Any]:
    """The metadata of a file; ValueError where they are not those of a model of this project."""
    about = json.loads(text or "{}")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"it is no model of the format {FORMAT}")
    config, klds = about.get("config"), about.get("kld_per_dim")
    entries = VAEConfig.__dataclass_fields__.keys()
    if not (
        isinstance(config, dict)
        and config.keys() == entries
        and isinstance(config["hidden_dims"], list)
        and 1 <= len(config["hidden_dims"]) <= DEEPEST
        and all(map(_is_size, [*config["hidden_dims"], config["latent_dim"], config["input_dim"]]))
        and config["activation"] in [*ACTIVATIONS]  # a list: what is compared may be of any type
    ):
        raise ValueError(
            f"its config is {config}; it must give 1 to {DEEPEST} hidden_dims, a latent_dim and an input_dim as whole "
            f"numbers, and as activation {' or '.join(ACTIVATIONS)}"
        )
    if not (
        isinstance(klds, list)
        and len(klds) == config["latent_dim"]
        and all(isinstance(kld, float) and math.isfinite(kld) for kld in klds)
    ):
        raise ValueError("its kld_per_dim is not one finite number for each latent dimension")
    if {type(about.get("dataset")), type(about.get("fingerprint"))} != {str}:
        raise ValueError("it does not name its data set and its fingerprint")
    return about
