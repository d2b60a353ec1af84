"""By how much two files of one type differ."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import safetensors.numpy
from PIL import Image

# The values in a file, as arrays by name.
READERS: Mapping[str, Callable[[bytes], Mapping[Any, Any]]] = {
    ".json": lambda content: {name: np.asarray(value, object) for name, value in json.loads(content).items()},
    ".csv": lambda content: {name: values.to_numpy() for name, values in pd.read_csv(io.BytesIO(content)).items()},
    ".png": lambda content: {"pixels": np.asarray(Image.open(io.BytesIO(content)))},
    ".npz": lambda content: dict(np.load(io.BytesIO(content))),
    ".safetensors": safetensors.numpy.load,
}


def difference(suffix: str, old: bytes, new: bytes) -> str:
    """In how many values, and in which of them most; the sizes where a file is not made of values."""
    sizes = f"{len(old):,} → {len(new):,} bytes"
    try:
        before, after = (READERS[suffix](content) for content in (old, new))
    except (KeyError, ValueError, OSError, safetensors.SafetensorError):
        return sizes
    if {name: array.shape for name, array in before.items()} != {name: array.shape for name, array in after.items()}:
        return f"{sizes}, with values of other names or number"
    differing = sum(int(np.sum(before[name] != after[name])) for name in before)
    if not differing:
        return f"{sizes}, with equal values"
    gaps = {name: largest_gap(before[name], after[name]) for name in before}
    most = max(gaps, key=lambda name: gaps[name])
    by = f" (by {gaps[most]:.2g})" if gaps[most] < np.inf else ""
    return f"{differing:,} of {sum(array.size for array in before.values()):,} values, most in {most}{by}"


def largest_gap(before: Any, after: Any) -> float:
    """The largest absolute difference of two arrays, infinite between unequal words."""
    try:
        return float(np.abs(before.astype(float) - after.astype(float)).max(initial=0))
    except (ValueError, TypeError):
        return np.inf if np.any(before != after) else 0.0
