"""The mean gradient of the processes of one host, and the sum of their losses, through memory that they share.

gloo would send the gradients of all weights through sockets after each mini-batch, and its barrier alone takes longer
than the averaging. Here each process writes its gradients into shared memory, counts there how often it has written,
and waits until the others have written as often.
"""

import os
import platform
import sys
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from mnist_vae.training.processes import ANSWER_S, POLL_S, ProcessLostError

# x86-64 shows the writes of one process to the others in their order: who sees a count sees the gradients before it.
IS_POSSIBLE = sys.platform == "linux" and platform.machine() == "x86_64"
LATE_S = 1  # of looking at the counts without a pause; then, from time to time, also whether all processes still run


class SharedMemoryStrategy(DDPStrategy):
    """Keeps DDP's promise without DDP: after ``backward``, a gradient is its mean over processes, equal bits in all."""

    def configure_ddp(self) -> None:
        """Leave the module as it is: equal seeds, or one checkpoint, give all processes the same weights."""
        assert self.lightning_module is not None
        self.weights = [*self.lightning_module.parameters()]
        count, processes = sum(weight.numel() for weight in self.weights), dist.get_world_size()
        self.total = torch.empty(count)
        self.memory = shared_memory(2 * processes * count, torch.float32).view(2, processes, count)
        self.turn = 0
        self.arrivals = shared_memory(processes, torch.int64).numpy()  # how often each process has written
        self.pids: list[int] = [0] * processes
        dist.all_gather_object(self.pids, os.getpid())

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients.

        Raises:
            ProcessLostError: another process has ended, or has not come for ANSWER_S seconds.
        """
        gradients = [weight.grad.flatten() for weight in self.weights if weight.grad is not None]
        mean = self._sum(gradients, self.total).div_(dist.get_world_size())
        for weight, part in zip(self.weights, mean.split([part.numel() for part in gradients]), strict=True):
            weight.grad = part.view_as(weight)

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """The sum of a tensor over all processes, in shared memory where it fits.

        Raises:
            ProcessLostError: another process has ended, or has not come for ANSWER_S seconds.
        """
        if reduce_op != "sum" or tensor.dtype != self.total.dtype or tensor.numel() > len(self.total):
            return super().reduce(tensor, group, reduce_op)
        return self._sum([tensor.flatten()], torch.empty(tensor.numel())).view_as(tensor)

    def _sum(self, parts: list[Tensor], total: Tensor) -> Tensor:
        """``total``, filled with the sum over all processes of what the parts (n,) are when laid side by side.

        Raises:
            ProcessLostError: another process has ended, or has not come for ANSWER_S seconds.
        """
        # Two halves take turns, so that one wait is enough: when all have written to one, all have read the other.
        places = self.memory[self.turn, :, : len(total)]  # (processes, n)
        self.turn = 1 - self.turn
        torch.cat(parts, out=places[dist.get_rank()])
        self._wait_for_all()
        torch.add(places[0], places[1], out=total)  # in the same order in all; sum(dim=0) takes twice as long
        for place in places[2:]:
            total.add_(place)
        return total

    def _wait_for_all(self) -> None:
        """Count that this process has written, and wait until all have written as often.

        Raises:
            ProcessLostError: another process has ended, or has not come for ANSWER_S seconds.
        """
        own = self.arrivals[dist.get_rank()] + 1
        self.arrivals[dist.get_rank()] = own
        since = time.monotonic()
        while self.arrivals.min() < own:
            seconds = time.monotonic() - since
            if seconds < LATE_S:
                os.sched_yield()  # there may be fewer cores than processes
                continue
            for number, pid in enumerate(self.pids, 1):
                if has_ended(pid):
                    raise ProcessLostError(f"process {number} of {len(self.pids)} has ended")
            if seconds > ANSWER_S:
                late = int(self.arrivals.argmin()) + 1
                raise ProcessLostError(f"process {late} of {len(self.pids)} has not answered for {ANSWER_S} s")
            time.sleep(POLL_S)


def has_ended(pid: int) -> bool:
    """Whether a process has ended; a zombie has, too, though its parent has not heard of it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def shared_memory(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros (count,) that all processes have, which are on one host. Linux only: a file in memory, without a name."""
    assert sys.platform == "linux"
    file = os.memfd_create("gradients")
    paths = [f"/proc/{os.getpid()}/fd/{file}"]
    dist.broadcast_object_list(paths, src=0)
    memory = torch.from_file(paths[0], shared=True, size=count, dtype=dtype)
    dist.barrier()  # everybody has opened the first process's file; it goes with the last of them
    os.close(file)
    return memory
