"""The journal behind Lightning's Logger interface."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist_vae.compat import cure_torchvision
from mnist_vae.data.binarization import metric_name
from mnist_vae.data.dataset import Binarize
from mnist_vae.tracking.session import Session

cure_torchvision()

from lightning.pytorch.loggers import Logger  # noqa: E402  after the cure


class JournalLogger(Logger):
    """Hands what Lightning logs to a session."""

    def __init__(self, session: Session, binarize: Binarize = "none") -> None:
        """Numbers of binarised images get names of their own (``metric_name``)."""
        super().__init__()
        self.session, self.binarize = session, binarize

    @property
    def name(self) -> str:
        return "mnist-vae"

    @property
    def version(self) -> str:
        return self.session.journal.fingerprint if self.session.journal else ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.session.log_metrics({metric_name(k, self.binarize): v for k, v in metrics.items()}, step or 0)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Parameters are recorded when a stage begins."""

    def log_image(self, key: str, images: Sequence[NDArray[np.uint8]], step: int) -> None:
        """Frames of a slider: gray images (H, W)."""
        for image in images:
            self.session.log_image(image, key, step)
