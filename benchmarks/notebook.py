"""The notebook that the pipeline is compared with, in other words but of the same structure.

A LightningModule with sigmoid and binary cross-entropy, plain Adam, three values logged at every step, a progress
bar, a CSV log, checkpoints as Lightning makes them by default, and a DataLoader that converts MNIST image by image.
Import it after ``compat.cure_torchvision()``.
"""

import shutil
from io import BytesIO
from pathlib import Path

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from scipy.stats import norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.clock import EpochClock
from mnist_vae.params import Grid, Samples, Train

SIDE = 28


class NotebookVAE(pl.LightningModule):
    """Model and optimisation in one; the decoder gives pixels, not logits."""

    def __init__(self, settings: Train) -> None:
        super().__init__()
        self.settings = settings
        self.hidden = nn.Linear(SIDE * SIDE, 256)
        self.mean, self.log_var = nn.Linear(256, 2), nn.Linear(256, 2)
        self.unhidden, self.pixels = nn.Linear(2, 256), nn.Linear(256, SIDE * SIDE)

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.pixels(torch.relu(self.unhidden(z))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.relu(self.hidden(x))
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        std = torch.exp(0.5 * log_var)
        return self.decode(mean + torch.randn_like(std) * std), mean, log_var

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x = batch[0].view(len(batch[0]), -1)
        pixels, mean, log_var = self(x)
        bce = F.binary_cross_entropy(pixels, x, reduction="sum")
        kld = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
        loss = bce + kld * self.settings.kl_weight
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True, logger=True)
        self.log_dict({"bce": bce, "kld": kld}, on_step=False, on_epoch=True, logger=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings = self.settings
        return torch.optim.Adam(
            self.parameters(),
            lr=settings.learning_rate,
            betas=tuple(settings.betas),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )


class Notebook:
    """The notebook's cells, in the current folder, which it fills as the notebook does: data/, lightning_logs/."""

    def __init__(self, settings: Train) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.clock = settings, EpochClock()

    def train(self, epochs: int, steps: int | None = None) -> list[float]:
        """Load the data and fit, on the CPU; the seconds of each epoch, of ``steps`` mini-batches if given."""
        images = datasets.MNIST("data", train=True, transform=transforms.ToTensor(), download=True)
        self.model = NotebookVAE(self.settings)
        self.log = CSVLogger("./")
        stopping = EarlyStopping(monitor="loss", patience=self.settings.patience, mode="min")
        pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            limit_train_batches=steps,
            logger=self.log,
            callbacks=[self.clock, stopping],
            enable_progress_bar=True,
        ).fit(self.model, DataLoader(images, batch_size=self.settings.batch_size, shuffle=True))
        return self.clock.seconds

    def draw(self, samples: Samples, grid: Grid) -> int:
        """The three figures, each rendered to PNG as a notebook shows it; their bytes."""
        return self._draw_losses() + self._draw_samples(samples) + self._draw_grid(grid)

    def _draw_losses(self) -> int:
        losses = pd.read_csv(Path(self.log.log_dir, "metrics.csv"))
        plt.figure(figsize=(8, 6), dpi=100)
        for name, marker in (("loss", "o"), ("bce", "^"), ("kld", "s")):
            plt.plot(losses["epoch"], losses[name], label=name, linewidth=2, marker=marker, markersize=10)
        plt.legend()
        plt.xlabel("Epoch")
        plt.ylabel("Loss")
        plt.tight_layout()
        return show()

    def _draw_samples(self, samples: Samples) -> int:
        images = self.model.decode(torch.randn(samples.rows * samples.cols, 2)).view(-1, SIDE, SIDE).detach().numpy()
        plt.figure(figsize=(samples.cols, samples.rows))
        for place, image in enumerate(images, start=1):
            plt.subplot(samples.rows, samples.cols, place)
            plt.imshow(image, cmap="gray")
            plt.axis("off")
        return show()

    def _draw_grid(self, grid: Grid) -> int:
        values = norm.ppf(np.linspace(*grid.quantiles, grid.size))
        canvas = np.zeros((SIDE * grid.size, SIDE * grid.size))
        for row, down in enumerate(values):
            for column, across in enumerate(values):
                with torch.no_grad():
                    image = self.model.decode(torch.FloatTensor([across, down])).view(SIDE, SIDE)
                canvas[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE] = image
        plt.figure(figsize=(10, 10))
        plt.imshow(canvas, cmap="gray")
        plt.axis("off")
        return show()


def show() -> int:
    """What ``plt.show()`` does in a notebook: the current figure as PNG; its bytes."""
    png = BytesIO()
    plt.savefig(png, format="png")
    plt.close()
    return len(png.getvalue())


def fetch_mnist(mirror: str | None) -> None:
    """MNIST into data/ as torchvision keeps it, from ``mirror`` (a URL or a folder) if there is one."""
    if mirror and "://" in mirror:
        datasets.MNIST.mirrors = [f"{mirror.rstrip('/')}/", *datasets.MNIST.mirrors]
    elif mirror:
        raw = Path("data", "MNIST", "raw")
        raw.mkdir(parents=True, exist_ok=True)
        for filename, _ in datasets.MNIST.resources:
            shutil.copyfile(Path(mirror, filename), raw / filename)  # torchvision checks and unpacks what it finds
    datasets.MNIST("data", download=True)
