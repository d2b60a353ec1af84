"""The bare loop: the pipeline's model, optimiser and batch size in plain torch, images in memory, nothing around it.

As fast as the common practice makes it: logits loss, fused Adam, a batch by one indexing of a uint8 tensor; and faster,
since the worker has denormal numbers count as zero here as for the pipeline (mnist_vae/cpu.py). Otherwise it shares no
code with the library, so that what the library costs cannot hide on both sides.
"""

import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_vae.params import Train


class BareEpoch(NamedTuple):
    """One epoch of the bare loop."""

    seconds: float
    loss: float  # nats per image


def bare_loop(images: Tensor, settings: Train, epochs: int, device: str = "cpu") -> list[BareEpoch]:
    """Train on uint8 images (N, 784) with the default model, 784-256-2-256-784."""
    torch.manual_seed(settings.seed)
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 4)).to(device)
    decoder = nn.Sequential(nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 784)).to(device)
    optimizer = torch.optim.Adam(
        [*encoder.parameters(), *decoder.parameters()],
        lr=settings.learning_rate,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    images, history = images.to(device), []
    for _ in range(epochs):
        started, total = time.perf_counter(), torch.zeros((), device=device)
        for index in torch.randperm(len(images), device=device).split(settings.batch_size):
            x = images[index].float().div_(255)  # (B, 784)
            mean, log_var = encoder(x).chunk(2, dim=1)  # (B, 2)
            z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)  # (B, 2)
            bce = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum")
            kld = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum()
            loss = bce + settings.kl_weight * kld
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        loss = total.item() / len(images)  # waits for the device
        history.append(BareEpoch(time.perf_counter() - started, loss))
    return history
