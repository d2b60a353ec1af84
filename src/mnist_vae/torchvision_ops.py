"""Lets torchvision import beside a torch build that its compiled operators were not made for.

torchvision declares Python counterparts for two of its C++ operators while it is imported, and fails when they
are missing. Nothing here uses them, so declaring their signatures is enough. Where the builds match, the
operators are there and this does nothing. Import it before torchvision, and before lightning, which imports
torchvision through torchmetrics.
"""

import importlib.util

import torch

SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def compiled_operators_load() -> bool:
    """Whether torchvision's own operator library is usable with this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None:
        return True  # no torchvision, nothing to cure
    for folder in spec.submodule_search_locations:
        finder = importlib.machinery.FileFinder(
            folder, (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
        )
        extension = finder.find_spec("_C")
        if extension is not None and extension.origin is not None:
            try:
                torch.ops.load_library(extension.origin)
            except OSError:
                return False
            return True
    return False


_library = None  # torch forgets the declarations when the Library object is collected
if not compiled_operators_load():
    _library = torch.library.Library("torchvision", "DEF")
    for signature in SIGNATURES:
        _library.define(signature)
