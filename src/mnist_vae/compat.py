"""The cure for a torchvision that was built for another torch.

torchvision declares Python counterparts for two of its C++ operators while it is imported, and fails when they are
missing: ``operator torchvision::nms does not exist``. That happens where its compiled part does not load, as beside a
CPU build of torch that came from elsewhere. Nothing here uses those operators, so declaring their signatures is enough.
Lightning imports torchvision too, through torchmetrics.

Where the builds match this does nothing. It can go when every supported platform gets both from one index.
"""

import importlib.machinery
import importlib.util
from functools import cache

SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def cure_torchvision() -> object:
    """Declare the operators if they are missing; call it before torchvision or lightning is imported.

    Returns what torch must not collect as garbage, lest it forget the declarations; the cache keeps it.
    """
    if compiled_operators_load():
        return None
    from torch.library import Library

    library = Library("torchvision", "DEF")
    for signature in SIGNATURES:
        library.define(signature)
    return library


def compiled_operators_load() -> bool:
    """Whether torchvision's own operator library is usable with this torch; true where there is no torchvision."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None:
        return True
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    for folder in spec.submodule_search_locations:
        extension = importlib.machinery.FileFinder(folder, loader).find_spec("_C")
        if extension is not None and extension.origin is not None:
            try:
                torch.ops.load_library(extension.origin)
            except OSError:
                return False
            return True
    return False
