"""What determines a trained model, as one name: equal fingerprints, equal bytes."""

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "lightning")  # those that compute


def fingerprint(**parts: Any) -> str:
    """A name of 16 hexadecimal digits for a training, from the data, the code, the parameters and the environment."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_code(paths: Iterable[Path]) -> str:
    """The SHA-256 of source files and of those in folders, with their names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                content = file.read_bytes()
                digest.update(f"{file.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def environment(*, portable: bool = False) -> Mapping[str, str]:
    """What the last bits of a result depend on beside code, data and parameters.

    Where the computation is ``portable``, that is not the processor's maker.
    """
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    vendors = re.findall(r"vendor_id\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    maker = vendors[0] if vendors else platform.processor() or "unknown"
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": "any" if portable else maker,  # MKL's kernels go by it
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{package: version(package).partition("+")[0] for package in PACKAGES},
    }
