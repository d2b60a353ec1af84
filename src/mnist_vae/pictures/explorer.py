"""The latent explorer: a decoder and the codes of a test set as one HTML page that needs nothing else.

The page (``explorer.html`` beside this file) decodes in the browser, so a pointer over the latent plane shows the
digit at that point at once. This module fills in what the page cannot know: the weights, the dots, the names.

Letters in shapes: N images, Z latent dimensions.
"""

import base64
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from mnist_vae.model.vae import VAE

TEMPLATE = Path(__file__).with_name("explorer.html")
SLIDERS = 8  # more than a person can steer, and the ninth most active dimension hardly shows
UNLABELLED = 255  # in place of a digit
CONTOURS = 3  # the plane always has room for the prior's 3σ circle


def explorer_html(
    vae: VAE,
    codes: ArrayLike,
    labels: ArrayLike | None,
    *,
    dataset: str,
    kld_per_dimension: ArrayLike | None = None,
    title: str = "Latent explorer",
) -> str:
    """A page in which a person moves through the latent space of ``vae``; equal arguments give equal bytes.

    ``codes`` (N, Z) are the posterior means of the images that appear as dots, ``labels`` (N,) their digits, if any,
    and ``dataset`` the real name of the data set. ``kld_per_dimension`` (Z,), in nats per image, says which dimensions
    are active: the two largest span the plane, the next eight get sliders, and the others rest at the prior's mean.
    Without it the variance of the codes decides (the measure of active units in Burda et al., "Importance weighted
    autoencoders", ICLR 2016, https://arxiv.org/abs/1509.00519).

    Raises ValueError when shapes disagree, or when weights or codes are not finite.
    """
    codes = np.asarray(codes, dtype=np.float32)
    labels = np.full(len(codes), UNLABELLED) if labels is None else np.asarray(labels)
    activity = (
        codes.var(axis=0, dtype=np.float64)
        if kld_per_dimension is None
        else np.asarray(kld_per_dimension, dtype=np.float64)
    )
    latent_dim = vae.config.latent_dim
    if labels.ndim != 1 or codes.shape != (len(labels), latent_dim) or activity.shape != (latent_dim,):
        shapes = f"codes {codes.shape}, labels {labels.shape} and activity {activity.shape}"
        raise ValueError(f"{shapes} do not fit latent_dim {latent_dim}")
    if not np.isfinite(codes).all():
        raise ValueError("codes are not all finite: the model did not converge")

    plane, sliders = rank_dimensions(activity)
    shown = codes[:, plane]
    extent = max(CONTOURS + 0.5, math.ceil(2 * np.abs(shown).max(initial=0)) / 2)  # every dot lies on the plane
    sizes, weights = decoder_weights(vae)
    data = {
        "layers": sizes,
        "activation": vae.config.activation,
        "weights": to_base64(weights, "<f2"),
        "plane": plane,
        "sliders": sliders,
        "nats": None if kld_per_dimension is None else activity.round(3).tolist(),
        "extent": extent,
        "codes": to_base64(np.rint(shown / extent * 32767), "<i2"),
        "labels": to_base64(labels, "u1"),
    }
    fields = {
        "title": html.escape(title),
        "dataset": html.escape(dataset),
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False),
    }
    # in one pass, so that a name which looks like a placeholder stays a name
    return re.sub(r"\{\{(\w+)\}\}", lambda placeholder: fields[placeholder[1]], TEMPLATE.read_text(encoding="utf-8"))


def rank_dimensions(activity: NDArray[np.floating]) -> tuple[list[int], list[int]]:
    """The dimensions that span the plane, in their own order, and those with a slider, most active first."""
    ranked = np.argsort(-activity, kind="stable").tolist()
    return sorted(ranked[:2]), ranked[2 : 2 + SLIDERS]


def decoder_weights(vae: VAE) -> tuple[list[int], NDArray[np.float16]]:
    """The decoder's layer sizes, Z first, and its weights in one row: each layer's matrix (out, in), then its bias.

    Half precision halves the page and moves no pixel by more than 1/255.
    """
    linear = [layer for layer in vae.decoder if isinstance(layer, nn.Linear)]
    sizes = [linear[0].in_features, *(layer.out_features for layer in linear)]
    tensors = [tensor for layer in linear for tensor in (layer.weight, layer.bias)]
    # Rounded by NumPy: the instruction that torch takes is emulated otherwise for denormal numbers.
    weights = np.concatenate([tensor.numpy(force=True).astype(np.float16).ravel() for tensor in tensors])
    if not np.isfinite(weights).all():
        raise ValueError("the decoder's weights are not all finite in half precision: the model did not converge")
    return sizes, weights


def to_base64(array: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode("ascii")
