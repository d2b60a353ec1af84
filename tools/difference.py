"""By how much two files of one type differ."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError


def difference(suffix: str, old: bytes, new: bytes) -> str:
    """In how many values, and in which of them most; the sizes where a file is not made of values."""
    sizes = f"{len(old):,} → {len(new):,} bytes"
    try:
        before, after = read_arrays(suffix, old), read_arrays(suffix, new)
    except (ValueError, OSError, SafetensorError):
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


def read_arrays(suffix: str, content: bytes) -> Mapping[str, Any]:
    """The values in a file as arrays by name; ValueError, OSError or SafetensorError where it has none."""
    file = io.BytesIO(content)
    match suffix:
        case ".json":
            return {name: np.asarray(value, dtype=object) for name, value in json.loads(content).items()}
        case ".csv":
            import pandas as pd

            return {str(name): column.to_numpy() for name, column in pd.read_csv(file).items()}
        case ".png":
            from PIL import Image

            return {"pixels": np.asarray(Image.open(file))}
        case ".npz":
            return dict(np.load(file))
        case ".safetensors":
            from safetensors.numpy import load

            return load(content)
    raise ValueError(f"{suffix} is no type of file with values")


def largest_gap(before: Any, after: Any) -> float:
    """The largest absolute difference of two arrays, infinite between unequal words."""
    try:
        return float(np.abs(before.astype(float) - after.astype(float)).max(initial=0))
    except (ValueError, TypeError):
        return np.inf if np.any(before != after) else 0.0
