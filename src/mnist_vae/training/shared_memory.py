"""The mean gradient of the processes of one host, through memory that they share.

gloo would send the gradients of all weights through sockets after each mini-batch. Here sockets only carry the word
that everybody has written.
"""

import os
import sys

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor


class SharedMemoryStrategy(DDPStrategy):
    """Keeps DDP's promise without DDP: after ``backward``, a gradient is its mean over processes, equal bits in all."""

    def configure_ddp(self) -> None:
        """Leave the module as it is: equal seeds, or one checkpoint, give all processes the same weights."""
        assert self.lightning_module is not None
        self.weights = [*self.lightning_module.parameters()]
        count = sum(weight.numel() for weight in self.weights)
        self.mean = torch.empty(count)
        self.memory = shared_memory(2 * dist.get_world_size() * count).view(2, -1, count)
        self.turn = 0

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients; a process that is lost meanwhile is noticed as in every call to all of them."""
        # Two halves take turns, so that one wait is enough: when all have written to one, all have read the other.
        places = self.memory[self.turn]  # (processes, weights)
        self.turn = 1 - self.turn
        gradients = [weight.grad.flatten() for weight in self.weights if weight.grad is not None]
        torch.cat(gradients, out=places[dist.get_rank()])
        dist.barrier()
        torch.add(places[0], places[1], out=self.mean)  # in the same order in all; mean(dim=0) takes twice as long
        for place in places[2:]:
            self.mean.add_(place)
        self.mean.div_(len(places))
        for weight, part in zip(self.weights, self.mean.split([part.numel() for part in gradients]), strict=True):
            weight.grad = part.view_as(weight)


def shared_memory(numbers: int) -> Tensor:
    """Zeros (numbers,) that all processes have, which are on one host. Linux only: a file in memory, without a name."""
    assert sys.platform == "linux"
    file = os.memfd_create("gradients")
    paths = [f"/proc/{os.getpid()}/fd/{file}"]
    dist.broadcast_object_list(paths, src=0)
    memory = torch.from_file(paths[0], shared=True, size=numbers)
    dist.barrier()  # everybody has opened the first process's file; it goes with the last of them
    os.close(file)
    return memory
