"""How torch and NumPy use the CPU."""

import torch
from threadpoolctl import threadpool_limits


def set_up_cpu(threads: int) -> None:
    """Give torch and NumPy this many threads, and have denormal numbers count as zero. Call it before any work.

    Denormal numbers, below about 1e-38 in float32, appear inside exp and log1p, and so in the loss of this model, where
    the decoder is sure of a pixel (a logit beyond about ±25). Processors take many times as long with them: as
    training progresses and the background becomes certain, an epoch would come to take twice as long as the first and
    more, with equal losses. Threads that torch starts later inherit the setting.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")
