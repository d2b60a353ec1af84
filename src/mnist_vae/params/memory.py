"""How much memory parameters ask for, and how much there is."""

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from mnist_vae.errors import UserError
from mnist_vae.params.sections import Params


def weights(hidden_dims: list[int], latent_dim: int) -> int:
    """Numbers in the weight matrices of encoder and decoder."""
    between = sum(a * b for a, b in pairwise([784, *hidden_dims]))
    return 2 * between + 3 * hidden_dims[-1] * latent_dim


def training_bytes(hidden_dims: list[int], latent_dim: int, batch_size: int, importance_samples: int) -> int:
    """Weights, gradients, Adam's two moments, and copies on the way to a checkpoint; what a mini-batch computes."""
    images = min(batch_size, 60_000)
    decoded = images * importance_samples
    return 56 * weights(hidden_dims, latent_dim) + 8 * (images + decoded) * (784 + sum(hidden_dims))


def evaluation_bytes(hidden_dims: list[int], latent_dim: int, neighbours: int, quality_images: int) -> int:
    """The largest block that a likelihood or a decoder works on; what the classifiers of codes compare."""
    block = 10_000 if latent_dim <= 2 else max(2_048, min(quality_images, 10_000))
    model = 4 * weights(hidden_dims, latent_dim) + 8 * block * (784 + max(hidden_dims))
    codes = 32 * 70_000 * latent_dim + 8 * (10 * latent_dim) ** 2  # the logistic regression's matrix, of 10 digits
    return model + codes + 40 * 10_000 * min(neighbours, 60_000)


def samples_bytes(rows: int, cols: int, hidden_dims: list[int]) -> int:
    """Images on their way through the decoder, and the picture's pixels, 100 × 100 to an image."""
    return rows * cols * (8 * max(hidden_dims) + 16 * 784) + 33 * (100 * rows + 50) * 100 * max(cols, 6)


def grid_bytes(size: int, hidden_dims: list[int]) -> int:
    """Images on their way through the decoder and matplotlib, whose picture has a fixed size."""
    return size**2 * (8 * max(hidden_dims) + 80 * 784)


# Estimates for MNIST's 60,000 + 10,000 images; the factors are of the resident memory that was measured.
NEEDS: tuple[tuple[str, Callable[..., int], tuple[str, ...]], ...] = (
    (
        "training",
        training_bytes,
        ("model.hidden_dims", "model.latent_dim", "train.batch_size", "train.importance_samples"),
    ),
    (
        "the evaluation",
        evaluation_bytes,
        ("model.hidden_dims", "model.latent_dim", "evaluate.neighbours", "evaluate.quality_images"),
    ),
    ("the picture", samples_bytes, ("samples.rows", "samples.cols", "model.hidden_dims")),
    ("the picture", grid_bytes, ("grid.size", "model.hidden_dims")),
)


def check_memory(params: Params) -> None:
    """Refuse parameters with which some stage would need more memory than this machine has.

    Raises:
        UserError: one line per such stage; it names those parameters that, lowered alone, would make it fit.
    """
    memory = memory_of_machine()
    sections = params.model_dump()  # as a whole: a test watches which attributes a stage reads
    values = {f"{section}.{name}": value for section, part in sections.items() for name, value in part.items()}
    lines = []
    for what, bytes_for, names in NEEDS:
        given = {name: values[name] for name in names}
        need = bytes_for(*given.values())
        if need > memory:
            least = {name: [1] * len(value) if isinstance(value, list) else 1 for name, value in given.items()}
            decisive = [name for name in names if bytes_for(*(given | {name: least[name]}).values()) <= memory] or names
            lines.append(
                f"params.yaml: {' and '.join(f'{name} is {given[name]}' for name in decisive)}: {what} needs "
                f"{_in_words(need)} and this machine has {_in_words(memory)}; lower {' or '.join(decisive)}"
            )
    if lines:
        raise UserError("\n".join(lines))


def memory_of_machine() -> int:
    """Bytes of memory of this machine, or of the container where its limit is lower."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, version 2 and 1
        try:
            sizes.append(int(Path("/sys/fs/cgroup", limit).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return min(sizes)


def _in_words(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.0f} PB"
