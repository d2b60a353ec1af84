"""A variational autoencoder on MNIST.

    from mnist_vae import load_model, manifold

    model = load_model("models/vae.safetensors")
    digits = manifold(model.vae, 15, (0.05, 0.95), model.kld_per_dim).images  # (225, 28, 28) in [0, 1]

The names below are the public API. Each loads its own room on first use, so that what needs no torch starts
without it. The library is pure: paths and the orchestrator belong to ``stages/``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_vae.data.dataset import Dataset, load_dataset
    from mnist_vae.errors import UserError
    from mnist_vae.evaluation.likelihood import importance_nll, quadrature_nll
    from mnist_vae.model.latent import decode, encode, manifold, prior_draws
    from mnist_vae.model.model_file import load_model, save_model
    from mnist_vae.model.vae import VAE, VAEConfig, negative_elbo
    from mnist_vae.params import load_params
    from mnist_vae.training.fit import fit

_ROOMS = {
    "data.dataset": ("Dataset", "load_dataset"),
    "errors": ("UserError",),
    "evaluation.likelihood": ("importance_nll", "quadrature_nll"),
    "model.latent": ("decode", "encode", "manifold", "prior_draws"),
    "model.model_file": ("load_model", "save_model"),
    "model.vae": ("VAE", "VAEConfig", "negative_elbo"),
    "params": ("load_params",),
    "training.fit": ("fit",),
}

__all__ = [
    "VAE",
    "Dataset",
    "UserError",
    "VAEConfig",
    "decode",
    "encode",
    "fit",
    "importance_nll",
    "load_dataset",
    "load_model",
    "load_params",
    "manifold",
    "negative_elbo",
    "prior_draws",
    "quadrature_nll",
    "save_model",
]


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
