"""A trained VAE as a file of plain types and tensors, which loads without running any code it contains."""

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mnist_vae.errors import UserError
from mnist_vae.files import replacing
from mnist_vae.vae import VAE, Architecture

FORMAT = "mnist-vae/1"

# What torch.load and what follows it were seen to raise for files with bytes flipped or missing.
DAMAGES = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, AssertionError),
    *(KeyError, IndexError, AttributeError, TypeError, ValueError),
)


class Checkpoint(NamedTuple):
    """A model and what it was made from."""

    vae: VAE
    dataset: str  # the title of what it was trained on
    kld_per_dim: list[float]  # mean over the training images, nats, (Z,)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the architecture, the weights and the rest; equal content gives equal bytes under an equal file name."""
    content = {
        "format": FORMAT,
        "architecture": asdict(checkpoint.vae.architecture),
        "weights": dict(checkpoint.vae.state_dict()),
        "dataset": checkpoint.dataset,
        "kld_per_dim": checkpoint.kld_per_dim,
    }
    with replacing(path) as scratch:
        torch.save(content, scratch)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what ``save_checkpoint`` wrote; the model is in evaluation mode, on the CPU.

    Raises:
        UserError: the file is missing, damaged, or some other program's.
    """
    remedy = "`dvc repro train` makes it again, `dvc checkout` restores the last one"
    try:
        content: Any = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} is a torch file, but no model of this project ({FORMAT}); {remedy}")
        vae = VAE(Architecture(**content["architecture"]))
        vae.load_state_dict(content["weights"])
        return Checkpoint(vae.eval(), content["dataset"], content["kld_per_dim"])
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    except DAMAGES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is damaged or no model of this project ({reason}); {remedy}") from error
