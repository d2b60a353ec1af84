"""The trained model as a server answers with it: z to images, images to the posterior. Arrays in, arrays out.

This file and those it imports are packed with each registered model, which MLflow loads by ``_load_pyfunc``: from
a safetensors file, so that loading unpickles nothing. Nothing here knows MLflow.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist_vae.model.model_file import load_model
from mnist_vae.model.vae import VAE, to_pixels

Floats = NDArray[np.floating]
LIBRARY = Path(__file__).resolve().parent.parent
PACKED = [  # all of the library that answering takes
    *(LIBRARY / f"{module}.py" for module in ("__init__", "errors", "files")),
    *(LIBRARY / "model" / f"{module}.py" for module in ("__init__", "model_file", "products", "vae")),
    *(LIBRARY / "tracking" / f"{module}.py" for module in ("__init__", "serving")),
]
SIDE = 28


class Decoder:
    """z (N, Z) to the likelihood's mean: images (N, 28, 28), float32 pixels from 0 (paper) to 1 (ink)."""

    def __init__(self, vae: VAE) -> None:
        self.vae = vae

    def example(self) -> Floats:
        """The centre of the prior, (1, Z)."""
        return np.zeros((1, self.vae.config.latent_dim), np.float32)

    @torch.inference_mode()
    def predict(self, z: Floats) -> Floats:
        """Decode z (N, Z) to images (N, 28, 28).

        Raises:
            ValueError: a value is no finite number; a server answers 400.
        """
        if not np.isfinite(z).all():
            raise ValueError("z must hold finite numbers only")
        images: Floats = to_pixels(self.vae.decode(tensor(z))).unflatten(-1, (SIDE, SIDE)).numpy()
        return images


class Encoder:
    """Images (N, 28, 28), float32 pixels from 0 (paper) to 1 (ink), to mean and variance of q(z|x), (N, Z) each."""

    def __init__(self, vae: VAE) -> None:
        self.vae = vae

    def example(self) -> Floats:
        """The image at the centre of the prior, (1, 28, 28)."""
        decoder = Decoder(self.vae)
        return decoder.predict(decoder.example()).round(3)

    @torch.inference_mode()
    def predict(self, images: Floats) -> dict[str, Floats]:
        """Encode images (N, 28, 28) to {mean: (N, Z), variance: (N, Z)}.

        Raises:
            ValueError: a pixel is outside of [0, 1]; a server answers 400.
        """
        if not ((images >= 0) & (images <= 1)).all():  # refuses nan too
            raise ValueError("pixels must be in [0, 1]; divide those of 0 to 255 by 255")
        posterior = self.vae.encode(tensor(images).flatten(1))
        return {"mean": posterior.mean.numpy(), "variance": posterior.log_var.exp().numpy()}


SERVED: dict[str, type[Decoder] | type[Encoder]] = {"decoder": Decoder, "encoder": Encoder}


def load(path: Path, part: str) -> Decoder | Encoder:
    """The decoder or the encoder of a model file."""
    return SERVED[part](load_model(path).vae)


def tensor(array: Floats) -> Tensor:
    """A float32 tensor of its own memory: arrays out of a request may be read-only."""
    return torch.tensor(array, dtype=torch.float32)


def fingerprint(path: Path) -> str:
    """Of a model file and the code that is packed with it."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in (path, *PACKED))).hexdigest()


def _load_pyfunc(path: str, config: dict[str, str]) -> Decoder | Encoder:
    """What MLflow calls to load a model; the name is MLflow's."""
    return load(Path(path), config["part"])
