"""How torch uses the CPU."""

import torch


def set_up_cpu(threads: int) -> None:
    """Give torch this many threads, and let the processor take denormal numbers for zero. Call it before any work.

    Denormal numbers, below about 1e-38 in float32, appear inside exp and log1p, and so in the loss of this model, where
    the decoder is sure of a pixel (a logit beyond about ±25). Processors take many times as long with them: as
    training progresses and the background becomes certain, an epoch would come to take twice as long as the first and
    more, with equal losses. Threads that torch starts later inherit the setting.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
