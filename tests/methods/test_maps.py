"""A linear map per slot: torch's product, or the native one whose rows do not depend on each other."""

from __future__ import annotations

import pytest
import torch

from server.methods.grouped import rows_of
from server.methods.maps import Maps, TorchLinear, indices
from server.model.kernels import choose_kernels
from server.settings import default_home

CPU = torch.device("cpu")


def test_slots_own_their_memory_and_give_it_back():
    maps = Maps(None, CPU, torch.float32)
    weight, bias = torch.randn(3, 4), torch.randn(3)
    maps.put(1, weight, bias)
    maps.put(2, weight.to(torch.bfloat16), None)
    kept = weight.clone()
    weight.zero_()
    x = torch.randn(5, 4)
    torch.testing.assert_close(maps.product(1, x, torch.tensor([4, 0])), x[[4, 0]] @ kept.T + bias)
    torch.testing.assert_close(maps.product(2, x, torch.tensor([1])), x[[1]] @ kept.to(torch.bfloat16).float().T)
    assert maps.nbytes == 4 * (12 + 3) + 4 * 12
    maps.clear(1)
    maps.clear(1)
    assert maps.nbytes == 4 * 12


def test_every_group_comes_with_its_tokens():
    rows = rows_of([2, 0, 1, 2])
    assert [(slot, index.tolist()) for slot, index in indices(rows)] == [(1, [2]), (2, [0, 3])]


def test_a_torch_map_counts_its_bytes():
    assert TorchLinear(torch.zeros(3, 4), None).nbytes == 48
    assert TorchLinear(torch.zeros(3, 4), torch.zeros(3)).nbytes == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_rows_are_equal_to_the_bit_in_any_company(dtype):
    kernels = choose_kernels(CPU, torch.float32, True, default_home(), lambda line: None)
    if kernels.linear is None:
        pytest.skip(kernels.name)
    weight, bias, x = torch.randn(50, 33).to(dtype), torch.randn(50), torch.randn(40, 33)
    maps = Maps(kernels.linear, CPU, torch.float32)
    maps.put(3, weight, bias)
    together = maps.product(3, x, torch.arange(40))
    torch.testing.assert_close(together, x @ weight.float().T + bias, atol=1e-4, rtol=1e-4)
    for some in ([7], [39, 7, 0], list(range(5, 30))):
        assert torch.equal(maps.product(3, x, torch.tensor(some)), together[some])
