"""Matrix products by NumPy are torch's, with their gradients."""

import numpy as np
import torch
from torch.nn import functional as F

from mnist_vae.model.products import Linear, LinearFunction, product


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_product_is_that_of_torch_also_of_a_transpose_and_of_no_rows():
    a, b = normal(5, 7), normal(3, 7, seed=1)

    torch.testing.assert_close(product(a, b.T), a @ b.T)
    torch.testing.assert_close(product(a[:0], b.T), a[:0] @ b.T)


def test_linear_is_torchs_layer_for_any_number_of_dimensions():
    layer = Linear(7, 3).double()

    for shape in [(7,), (5, 7), (2, 5, 7), (0, 7)]:
        x = normal(*shape)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_linear_has_the_gradients_that_finite_differences_have():
    weight, bias = (normal(*shape).requires_grad_() for shape in [(3, 7), (3,)])

    for shape in [(7,), (5, 7), (2, 5, 7)]:
        assert torch.autograd.gradcheck(LinearFunction.apply, (normal(*shape).requires_grad_(), weight, bias))


def test_with_more_threads_products_are_torchs_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(np, "matmul", None)
    layer, x = Linear(7, 3), normal(5, 7).float()

    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(product(x, x.T), x @ x.T)


def test_linear_takes_torchs_own_product_in_less_precision():
    layer, x = Linear(7, 3), normal(5, 7).float()

    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
