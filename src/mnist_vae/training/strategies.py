"""How several processes come to one gradient, that of the sum over all of them, where Lightning's DDP takes the mean.

On one host no gradient is sent. gloo would send those of all weights through sockets after each mini-batch, and its
barrier alone takes longer than adding them up. Instead, weights, gradients and the optimiser's moments lie in memory
that the processes share: each counts there how often it has come to a point, and waits until the others have come.
"""

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import psutil
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from mnist_vae.training.processes import ANSWER_S, POLL_S, ProcessLostError

# x86-64 shows the writes of one process to the others in their order: who sees a count sees what was written before it.
IS_POSSIBLE = sys.platform == "linux" and platform.machine() == "x86_64"
LATE_S = 1  # of looking at the counts without a pause; then, from time to time, also whether all processes still run


class SummingDDPStrategy(DDPStrategy):
    """After ``backward`` each process has the gradient of the sum over all of them."""

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the gradients of as many times the loss as DDP will divide them by."""
        return super().backward(closure_loss * dist.get_world_size(), *args, **kwargs)


class SharedMemoryStrategy(DDPStrategy):
    """After ``backward`` a weight's owner has the gradient of the sum over all processes; the others have none.

    Their optimiser passes over it. After the step all see the new weight. This is stage 1 of ZeRO (Rajbhandari et al.,
    2020, https://arxiv.org/abs/1910.02054) without any messages.
    """

    weights: Sequence[Tensor] = ()  # none yet where setting up fails before them

    def configure_ddp(self) -> None:
        """Move the weights, which are equal in all processes, to memory that these share."""
        assert self.lightning_module is not None
        self.rank, processes = dist.get_rank(), dist.get_world_size()
        self.pids: list[int] = [0] * processes
        dist.all_gather_object(self.pids, os.getpid())
        self.arrivals = shared_memory(processes, torch.int64).numpy().data  # how often each process has come
        self.weights = [*self.lightning_module.parameters()]
        for weight in self.weights:
            weight.data = shared(weight.data)
        sizes = [weight.numel() for weight in self.weights]
        owners = equal_parts(sizes, processes)  # the rank of each weight's owner
        # A row for each process to write. Its parts are found here once, not in each step, which is short.
        self.memory = shared_memory(processes * sum(sizes), torch.float32).view(processes, -1)
        self.given: list[tuple[Tensor, Tensor]] = []  # others' weights, and where their gradients go
        self.taken: list[tuple[Tensor, list[Tensor]]] = []  # own weights, and where the others' gradients are
        for weight, owner, part in zip(self.weights, owners, self.memory.split(sizes, dim=1), strict=True):
            rows = [*part.view(processes, *weight.shape)]
            row = rows.pop(self.rank)
            if owner == self.rank:
                self.taken.append((weight, rows))
            else:
                self.given.append((weight, row))

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Make the optimiser, with moments that are shared: what the first process keeps of them is complete."""
        super().setup_optimizers(trainer)
        self._share_moments()

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over the moments of a checkpoint."""
        super().load_optimizer_state_dict(checkpoint)
        self._share_moments()

    def _share_moments(self) -> None:
        """Move Adam's state to shared memory; where it is empty, zeros are what its first step would begin with."""
        state = self.optimizers[0].state
        for weight in self.weights:
            zeros = torch.zeros_like(weight.data)
            empty = {"step": zeros.new_zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros}
            state[weight] = {name: shared(value) for name, value in (empty | state[weight]).items()}

    def post_backward(self, closure_loss: Tensor) -> None:
        """Give the gradients of others' weights away, and add up those of the own ones.

        Raises:
            ProcessLostError: another process has ended, or has not come for ANSWER_S seconds.
        """
        for weight, row in self.given:
            assert weight.grad is not None
            row.copy_(weight.grad)
            weight.grad = None
        self._wait_for_all()
        for weight, rows in self.taken:
            assert weight.grad is not None
            for row in rows:
                weight.grad += row

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Change the own weights, and wait until the others have changed theirs.

        Raises:
            ProcessLostError: another process has ended, or has not come for ANSWER_S seconds.
        """
        result = super().optimizer_step(*args, **kwargs)
        self._wait_for_all()
        return result

    def teardown(self) -> None:
        """Give each process weights of its own."""
        for weight in self.weights:
            weight.data = weight.data.clone()
        super().teardown()

    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """The sum of a tensor over all processes, in shared memory where it fits.

        Raises:
            ProcessLostError: another process has ended, or has not come for ANSWER_S seconds.
        """
        if reduce_op != "sum" or tensor.dtype != self.memory.dtype or tensor.numel() > self.memory.shape[1]:
            return super().reduce(tensor, group, reduce_op)
        rows = self.memory[:, : tensor.numel()]
        rows[self.rank] = tensor.flatten()
        self._wait_for_all()
        total = rows.sum(dim=0).view_as(tensor)
        self._wait_for_all()  # all have read what the next gradients will overwrite
        return total

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes, or at least one of them, have decided so.

        Raises:
            ProcessLostError: another process has ended, or has not come for ANSWER_S seconds.
        """
        yes = self.reduce(torch.tensor(float(decision)), reduce_op="sum")
        return bool(yes >= (len(self.pids) if all else 1))

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait until all processes have come here.

        Raises:
            ProcessLostError: another process has ended, or has not come for ANSWER_S seconds.
        """
        if self.weights:
            self._wait_for_all()
        else:
            super().barrier(*args, **kwargs)

    def _wait_for_all(self) -> None:
        """Count that this process has come, and wait until all have come as often.

        Raises:
            ProcessLostError: another process has ended, or has not come for ANSWER_S seconds.
        """
        own = self.arrivals[self.rank] + 1
        self.arrivals[self.rank] = own
        since = time.monotonic()
        while min(self.arrivals) < own:
            seconds = time.monotonic() - since
            if seconds < LATE_S:
                os.sched_yield()  # there may be fewer cores than processes
                continue
            for number, pid in enumerate(self.pids, 1):
                if has_ended(pid):
                    raise ProcessLostError(f"process {number} of {len(self.pids)} has ended")
            if seconds > ANSWER_S:
                counts = self.arrivals.tolist()
                late = counts.index(min(counts)) + 1
                raise ProcessLostError(f"process {late} of {len(self.pids)} has not answered for {ANSWER_S} s")
            time.sleep(POLL_S)


def equal_parts(sizes: Sequence[int], count: int) -> list[int]:
    """To which of ``count`` parts each size goes: the largest first, to what has least by then."""
    parts, loads = [0] * len(sizes), [0] * count
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        parts[number] = loads.index(min(loads))
        loads[parts[number]] += sizes[number]
    return parts


def has_ended(pid: int) -> bool:
    """Whether a process has ended; a zombie has, too, though its parent has not heard of it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def shared(tensor: Tensor) -> Tensor:
    """A copy, in memory that all processes have, of a tensor that is equal in all of them.

    In a memory of its own: with a tensor, a checkpoint keeps all of the memory that it is part of.
    """
    return shared_memory(tensor.numel(), tensor.dtype).copy_(tensor.flatten()).view_as(tensor)


def shared_memory(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros (count,) that all processes have, which are on one host. Linux only: a file in memory, without a name."""
    assert sys.platform == "linux"
    file = os.memfd_create("training")
    paths = [f"/proc/{os.getpid()}/fd/{file}"]
    dist.broadcast_object_list(paths, src=0)
    memory = torch.from_file(paths[0], shared=True, size=count, dtype=dtype)
    dist.barrier()  # everybody has opened the first process's file; it goes with the last of them
    os.close(file)
    return memory
