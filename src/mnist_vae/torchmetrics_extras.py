"""Lets lightning import without the packages that torchmetrics would bring along.

Lightning needs torchmetrics for one base class, and torchmetrics imports whatever its many metrics could use and finds
installed: torchvision, with its models, and scipy.signal. Together they take longer than lightning itself, and nothing
here uses those metrics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from unittest.mock import patch

from lightning_utilities.core import imports  # where torchmetrics asks what is installed


@contextmanager
def torchmetrics_without(*packages: str) -> Iterator[None]:
    """While this is open, torchmetrics and lightning look for these packages in vain; plain imports find them."""
    version, find_spec = imports._version, imports.find_spec

    def version_if_shown(name: str) -> str:
        if name in packages:
            raise PackageNotFoundError(name)
        return version(name)

    def spec_if_shown(name: str):
        return None if name in packages else find_spec(name)

    with patch.multiple(imports, _version=version_if_shown, find_spec=spec_if_shown):
        yield
