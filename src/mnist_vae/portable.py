"""The same bytes on every x86-64 processor with AVX2: what the libraries that compute are told before they are loaded.

Left alone, each of them takes the kernels that suit the processor best, and these round differently. Matrix products,
where Intel's MKL knows no setting that is both fast and obeyed on AMD, are in ``model/products.py``.
"""

import os
import platform
import re
from pathlib import Path

SETTINGS = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels
    "MKL_CBWR": "COMPATIBLE",  # MKL inside torch: exp and log of a tensor
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",  # NumPy's functions
    "OPENBLAS_CORETYPE": "Haswell",  # matrix products and linear algebra of NumPy and SciPy
}
NEEDED = {"avx2", "fma"}  # without them a library fails, or takes other kernels all the same


def set_up_libraries() -> None:
    """Tell them, where the processor can do it; what the environment says already stands. Call it before any import."""
    if is_able():
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)


def is_portable() -> bool:
    """Whether this process was told so, and so gives the bytes of every other such process."""
    return is_able() and all(os.environ.get(name) == value for name, value in SETTINGS.items())


def is_able() -> bool:
    """Whether this is an x86-64 processor with what is needed, as far as Linux tells."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return platform.machine() == "x86_64" and found is not None and set(found[1].split()) >= NEEDED
