"""Training in a fraction of a second: the notebook's settings, a few images, a small model."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from mnist_vae.model.vae import VAEConfig
from mnist_vae.params import Train, load_params

COMMITTED = Path(__file__).parent.parent / "params.yaml"  # the notebook's settings
CONFIG = VAEConfig(hidden_dims=(8,), latent_dim=2)


def settings(**changes: Any) -> Train:
    """Two epochs of seven steps on 100 images, with some of it changed."""
    small = {"epochs": 2, "batch_size": 16, "accelerator": "cpu"}
    return Train(**(load_params(COMMITTED).train.model_dump() | small | changes))


def weights(module: nn.Module) -> Tensor:
    """A copy of all weights, as one vector."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])


class Recorder(Logger):
    """Keeps the numbers that a logger is handed, each with its step."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.records.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass
