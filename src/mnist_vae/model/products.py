"""Matrix products whose last bits do not depend on who made the processor.

torch's own, by MKL, take other kernels on Intel than on AMD, which sum in another order. NumPy's OpenBLAS takes the
kernels that OPENBLAS_CORETYPE names (``mnist_vae.portable``), and is as fast. With more than one thread, those of
torch and those of OpenBLAS would keep the cores from each other by waiting, so there the products are torch's.

Letters in shapes: N rows, I and O features.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_numpys(x: Tensor) -> bool:
    """Whether products of ``x`` are NumPy's: on the CPU, in one thread."""
    return x.device.type == "cpu" and torch.get_num_threads() == 1


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, I) · b (I, O), (N, O), without a gradient."""
    if not is_numpys(a):
        return a @ b
    result = a.new_empty(len(a), b.shape[1])
    np.matmul(a.detach().numpy(), b.detach().numpy(), out=result.numpy())
    return result


def rows_of(x: Tensor) -> Tensor:
    """x (…, I) as (N, I)."""
    return x.reshape(-1, x.shape[-1])


class LinearFunction(torch.autograd.Function):
    """x (…, I) · weightᵀ (I, O) + bias (O,), and its gradient, by ``product``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(…, O)."""
        ctx.save_for_backward(x, weight)
        return product(rows_of(x), weight.t()).add_(bias).view(*x.shape[:-1], len(bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """The gradient by each argument, from that by the result (…, O)."""
        x, weight = ctx.saved_tensors
        rows = rows_of(grad)
        to_x = product(rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return to_x, product(rows.t(), rows_of(x)), rows.sum(dim=0)


class Linear(nn.Linear):
    """torch's linear layer, by ``product`` where that is NumPy's."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) to (…, O)."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not is_numpys(x):
            return F.linear(x, self.weight, self.bias)
        result: Tensor = LinearFunction.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return result
