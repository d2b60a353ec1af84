"""The model card: one page of Markdown that says what a model is, what it was made from, and how good it is."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mnist_vae.data.dataset import Binarize
from mnist_vae.evaluation.evaluate import Metrics
from mnist_vae.evaluation.sample_quality import FEATURE_SPACE, NEIGHBOURS


class Meaning(NamedTuple):
    """What a number is."""

    unit: str
    text: str
    source: str = ""


_NATS = "nats/image"
_KINGMA = "Kingma & Welling 2014"
_BURDA = "Burda et al. 2016"
_QUALITY = {
    "precision": Meaning("share", "{} that lie in the ball of a real image", "Kynkäänniemi et al. 2019"),
    "recall": Meaning("share", "real images that lie in the ball of one of the {}", "Kynkäänniemi et al. 2019"),
    "density": Meaning("ratio", "real balls around each of the {}, over k; may exceed 1", "Naeem et al. 2020"),
    "coverage": Meaning("share", "real images whose ball holds one of the {}", "Naeem et al. 2020"),
}
_CONTENDERS = {
    "samples": "prior samples",
    "reconstructions": "reconstructions",
    "reference": "training images (what real images score)",
}

MEANINGS: dict[str, Meaning] = {
    "loss": Meaning(_NATS, "bce + kl_weight · kld, z sampled: what training minimises with one draw of z", _KINGMA),
    "loss_se": Meaning(_NATS, "standard error of loss over draws of z"),
    "bce": Meaning(_NATS, "−log p(x|z) with z from q(z|x): the reconstruction term", _KINGMA),
    "kld": Meaning(_NATS, "KL(q(z|x) ‖ p(z)), exact", _KINGMA),
    "elbo": Meaning(_NATS, "−(bce + kld): a lower bound of log p(x)", _KINGMA),
    "elbo_se": Meaning(_NATS, "standard error of elbo over draws of z"),
    "kld_z*": Meaning(_NATS, "the part of kld in one latent dimension", _KINGMA),
    "nll": Meaning(_NATS, "−log p(x), by the method that nll_method names", _BURDA),
    "nll_se": Meaning(_NATS, "standard error of nll over test images"),
    "nll_method": Meaning("", "quadrature over z, or importance sampling with K draws"),
    "val_nll": Meaning(_NATS, "−log p(x) of the held-out training images, by which the champion is chosen", _BURDA),
    "val_nll_se": Meaning(_NATS, "standard error of val_nll over those images"),
    "nll_halving_change": Meaning(_NATS, "quadrature: what halving its step, to evaluate.quadrature_step, changed"),
    "nll_half_samples": Meaning(_NATS, "sampling: nll from half of the draws, the mean of two repeats; falls with K"),
    "nll_half_samples_se": Meaning(_NATS, "standard error of nll_half_samples over its two repeats"),
    "active_units": Meaning(
        "count", "latent dimensions whose posterior mean has a variance > 0.01 over images", _BURDA
    ),
    "knn_accuracy": Meaning(
        "share", "test digits that the nearest training codes classify correctly (posterior means)"
    ),
    "linear_probe_accuracy": Meaning(
        "share", "test digits that logistic regression on training codes classifies correctly"
    ),
    **{
        f"{who}_{figure}": meaning._replace(text=meaning.text.format(what))
        for who, what in _CONTENDERS.items()
        for figure, meaning in _QUALITY.items()
    },
}

BY_DIGIT = ", by digit"

PICTURES = {
    "grid.png": "The latent space, decoded at quantiles of the prior",
    "samples.png": "Draws from the prior, decoded",
    "reconstructions.png": "Test images over their reconstructions, best to worst",
    "latents.png": "Test images in the latent space",
    "nll.png": f"Negative log-likelihood of the test images{BY_DIGIT}",
    "traversal.png": "Each active dimension on its own",
    "losses.png": "Losses of each epoch",
}

NO_LABELS = (
    "The images have no labels: knn_accuracy and linear_probe_accuracy are left out, and no picture tells digits apart"
)
COLLAPSED = "the posterior has collapsed: no latent dimension tells images apart; lower train.kl_weight or train longer"

CAVEATS: dict[Binarize, str] = {
    "none": "Pixels are gray, so the Bernoulli likelihood is not normalised: compare with other gray results only.",
    "dynamic": "Training pixels are drawn anew each epoch, test pixels once, as in the work on dynamic MNIST.",
    "static": "All pixels are drawn once, from this project's own seed: not the file of Larochelle & Murray (2011).",
}

SMOOTH = (  # pictures of a binarised model are not: their pixels are drawn
    " Smooth pixel means lie closer to the real images than these lie to each other: that drives precision and density "
    "up and recall down, so read coverage first."
)


def model_card(
    title: str,
    binarize: Binarize,
    facts: Mapping[str, Any],
    metrics: Metrics,
    params: Mapping[str, Any],
) -> str:
    """The page: ``facts`` about data, model and code, every number with its error and meaning, pictures, parameters.

    Picture links are relative to a folder beside ``plots/``.
    """
    labelled = "knn_accuracy" in metrics
    return "\n".join([
        f"# mnist-vae on {title}",
        "",
        "A variational autoencoder; this page was made by the `evaluate` stage from the model it describes.",
        "",
        *_table("what", facts),
        "",
        "## Numbers",
        "",
        f"On the test images. {CAVEATS[binarize]}",
        "",
        *numbers_table(metrics),
        "",
        *([] if labelled else [f"{NO_LABELS}.", ""]),
        *([f"**Warning:** {COLLAPSED}.", ""] if metrics.get("active_units") == 0 else []),
        f"Sample quality is measured in the space “{FEATURE_SPACE}”, with k = {NEIGHBOURS} and equal numbers of images "
        "on both sides. It compares models of this project with each other and with the reference. It is comparable "
        "neither with the same figures in an Inception or VGG space nor with FID."
        f"{SMOOTH if binarize == 'none' else ''}",
        "",
        "## Pictures",
        "",
        *(
            f"![{caption if labelled else caption.removesuffix(BY_DIGIT)}](../plots/{picture})\n"
            for picture, caption in PICTURES.items()
        ),
        "The latent space to play with: [plots/explorer.html](../plots/explorer.html).",
        "",
        "## Parameters",
        "",
        *_table("parameter", params),
        "",
    ])  # fmt: skip


def numbers_table(metrics: Metrics) -> list[str]:
    """Every number with its error, unit, meaning and source, as the lines of a Markdown table."""
    return [
        _row("name", "value ± standard error", "unit", "meaning", "source"),
        _row(*["---"] * 5),
        *(
            _row(f"`{name}`", _with_error(name, metrics), *meaning_of(name))
            for name in metrics
            if not name.endswith("_se")
        ),
    ]


def meaning_of(name: str) -> Meaning:
    """The entry of MEANINGS for a metric; the latent dimensions share one."""
    return MEANINGS["kld_z*" if name.startswith("kld_z") else name]


def _with_error(name: str, metrics: Metrics) -> str:
    value = metrics[name]
    if not isinstance(value, float):
        return str(value)
    error = metrics.get(f"{name}_se")
    return f"{value:.4g}" if error is None and abs(value) < 1 else f"{value:.2f}" + (f" ± {error:.2g}" if error else "")


def _table(head: str, rows: Mapping[str, Any]) -> list[str]:
    return [_row(head, "value"), _row("---", "---"), *(_row(name, f"`{value}`") for name, value in rows.items())]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def is_detail(name: str) -> bool:
    """Whether a number says how sure or how composed another one is, and deserves no chart of its own."""
    return name.endswith("_se") or name.startswith(("nll_", "kld_z", "reference_"))


def group(name: str) -> str:
    """A metric's name in MLflow, where a slash makes groups: test/nll, val/nll, quality/samples_coverage."""
    if name.startswith("val_"):
        return f"val/{name.removeprefix('val_')}"
    return f"quality/{name}" if name.startswith(tuple(_CONTENDERS)) else f"test/{name}"
