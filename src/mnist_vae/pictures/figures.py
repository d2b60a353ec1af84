"""Every picture, from arrays to a matplotlib figure.

Pictures are built on ``Figure`` itself, without pyplot: no global state, no window system, half the import time.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from mnist_vae.files import atomic_write
from mnist_vae.model.latent import Manifold, tile
from mnist_vae.model.vae import Posterior

NATS = "nats per image"
DIGIT_COLOURS = "tab10"  # the same ten in each picture


def save_png(path: Path, figure: Figure) -> None:
    """Write a figure; its bytes carry no date and no version of matplotlib."""
    with atomic_write(path) as scratch:
        figure.savefig(scratch, dpi=100, metadata={"Software": None})


def losses_figure(history: dict[str, list[float]], dataset: str) -> Figure:
    """The notebook's loss curves, from columns epoch, loss, bce, kld (and val_…), nats per image.

    Its three series and markers, in two panels: the KL divergence is far smaller than the other two.
    """
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for axes, name, label, marker, colour in (
        (upper, "loss", "Loss", "o", "C0"),
        (upper, "bce", "BCE loss", "^", "C1"),
        (lower, "kld", "KLD loss", "s", "C2"),
    ):
        axes.plot(history["epoch"], history[name], marker=marker, color=colour, lw=2, ms=8, label=label)
        if f"val_{name}" in history:
            style = {"color": colour, "lw": 2, "ls": "--", "marker": marker, "ms": 5, "mfc": "white"}
            axes.plot(history["epoch"], history[f"val_{name}"], label=f"{label}, validation", **style)
    for axes in (upper, lower):
        axes.set_ylabel(NATS)
        axes.grid(alpha=0.3)
        axes.legend()
    lower.set_xlabel("epoch")
    lower.xaxis.get_major_locator().set_params(integer=True)
    upper.set_title(f"Training losses · {dataset}")
    return figure


def reconstructions_figure(x: np.ndarray, reconstructions: np.ndarray, nats: np.ndarray, dataset: str) -> Figure:
    """Images (N, 28, 28) over their reconstructions, sorted as given, each with its −log p(x|z) in nats (N,)."""
    figure = Figure(figsize=(len(x), 2.6), layout="constrained")
    for column, pair in enumerate(zip(x, reconstructions, strict=True)):
        for row, image in enumerate(pair):
            axes = figure.add_subplot(2, len(x), row * len(x) + column + 1)
            _show(axes, image)
        axes.set_title(f"{nats[column]:.0f}", y=-0.3, fontsize=9)
    figure.suptitle(f"Test images over their reconstructions, best to worst, −log p(x|z) in nats · {dataset}")
    return figure


def latents_figure(
    posterior: Posterior, labels: np.ndarray | None, dimensions: tuple[int, int], ellipses: np.ndarray, dataset: str
) -> Figure:
    """The latent space: posterior means (N, Z) along two dimensions, coloured by digit (N,) where there are labels.

    ``ellipses`` are the indices of images whose posterior is drawn in full, as its one-sigma ellipse. A latent
    space of one dimension gets a row for each digit instead of a second axis; one row where there are no labels.
    """
    means, stds = posterior.mean.numpy(), np.exp(0.5 * posterior.log_var.numpy())  # (N, Z)
    across, down = dimensions
    figure = Figure(figsize=(8.5, 7), layout="constrained")
    axes = figure.subplots()
    flat = means.shape[1] == 1
    digits = np.zeros(len(means), np.uint8) if labels is None else labels
    rows = digits if flat else means[:, down]
    points = axes.scatter(means[:, across], rows, c=digits, cmap=DIGIT_COLOURS, vmin=0, vmax=9, s=3)
    for image in ellipses:
        width, height = 2 * stds[image, across], 0.5 if flat else 2 * stds[image, down]
        centre = (means[image, across], rows[image])
        axes.add_patch(Ellipse(centre, width, height, facecolor="none", edgecolor="black", lw=1))
    axes.set_xlabel(f"posterior mean of z[{across}]")
    if flat and labels is None:
        axes.set_yticks([])
    else:
        axes.set_ylabel("digit" if flat else f"posterior mean of z[{down}]")
    axes.invert_yaxis()  # z[1] runs down, as in the grid
    axes.set_aspect("auto" if flat else "equal")
    axes.grid(alpha=0.3)
    if labels is not None:
        axes.legend(*points.legend_elements(num=range(10)), title="digit", loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(f"Test images in the latent space, some with their posterior's one-sigma ellipse\n{dataset}")
    return figure


def nll_figure(nll: np.ndarray, labels: np.ndarray | None, dataset: str) -> Figure:
    """How the negative log-likelihood of test images (N,), in nats, is spread, by digit (N,) if labelled."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    bins = np.linspace(nll.min(), nll.max(), 40)
    groups = {"": nll} if labels is None else {f"{digit}: ": nll[labels == digit] for digit in range(10)}
    grid = (1, 1) if labels is None else (2, 5)
    panels = figure.subplots(*grid, sharex=True, sharey=True, squeeze=False).flat
    for colour, (axes, (group, of_group)) in enumerate(zip(panels, groups.items(), strict=True)):
        axes.hist(of_group, bins=bins, color=f"C{colour}")
        if len(of_group):
            axes.axvline(of_group.mean(), color="black", lw=1)
            axes.set_title(f"{group}mean {of_group.mean():.1f}", fontsize=10)
    by_digit = "" if labels is None else ", by digit"
    figure.suptitle(f"Negative log-likelihood of the test images{by_digit} · {dataset}")
    figure.supxlabel("−log p(x), nats")
    figure.supylabel("images")
    return figure


def traversal_figure(images: np.ndarray, values: np.ndarray, dimensions: list[int], dataset: str) -> Figure:
    """One row per active dimension: images (rows · columns, 28, 28) as z takes ``values`` along it, others at 0."""
    figure = Figure(figsize=(10, max(2.2, 0.8 * len(dimensions) + 1)), layout="constrained")
    axes = figure.subplots()
    _show(axes, tile(images, len(values)))
    axes.axis("on")
    axes.set_xticks(*_ticks(values))
    axes.set_yticks([28 * row + 13.5 for row in range(len(dimensions))], [f"z[{dim}]" for dim in dimensions])
    axes.set_xlabel("value of that z, the others at the prior’s mean")
    axes.set_title(f"Each active dimension on its own, most informative first · {dataset}")
    return figure


def samples_figure(images: np.ndarray, cols: int, dataset: str) -> Figure:
    """Decoded draws from the prior (rows · cols, 28, 28), in reading order."""
    rows = len(images) // cols
    figure = Figure(figsize=(max(cols, 6), rows + 0.5), layout="constrained")
    axes = figure.subplots()
    _show(axes, tile(images, cols))
    axes.set_title(f"{rows} × {cols} draws from the prior, decoded · {dataset}")
    return figure


def manifold_figure(grid: Manifold, dataset: str) -> Figure:
    """The decoder's images over a grid of z, with the values of z at the edges."""
    columns, rows = len(grid.across), len(grid.down)
    figure = Figure(figsize=(10, 10.3 * max(rows / columns, 0.2)), layout="constrained")
    axes = figure.subplots()
    _show(axes, tile(grid.images, columns))
    axes.axis("on")
    axes.set_title(f"The latent space, decoded at quantiles of the prior · {dataset}")
    axes.set_xticks(*_ticks(grid.across))
    axes.set_xlabel(f"z[{grid.dimensions[0]}]")
    if rows > 1:
        axes.set_yticks(*_ticks(grid.down))
        axes.set_ylabel(f"z[{grid.dimensions[1]}]")
    else:
        axes.set_yticks([])
    return figure


def _ticks(values: np.ndarray, most: int = 15) -> tuple[list[float], list[str]]:
    """Positions in pixels and labels for at most ``most`` of a row of digits, both ends among them."""
    shown = sorted({round(i) for i in np.linspace(0, len(values) - 1, min(len(values), most))})
    return [28 * i + 13.5 for i in shown], [f"{round(values[i], 2) + 0.0:.2f}" for i in shown]  # no −0.00


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.axis("off")
