"""Packed linears and widened embeddings: the same arithmetic as what they replace, and nothing replaced that is special."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model.linear import PackedModule, WideningEmbedding, pack_model
from server.model.loader import weight_of
from server.model.native import NativeKernels, NativeUnavailable, open_library
from server.model.native.int8 import Int8Weight
from server.settings import default_home
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    torch.set_num_threads(1)
    try:
        return open_library(default_home(), lambda line: None)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(module: nn.Module, native: NativeKernels) -> nn.Module:
    """The module as `pack_model` leaves it."""
    holder = nn.ModuleDict({"only": module})
    pack_model(holder, native)
    return holder["only"]


def linear(exact_in_bf16: bool, bias: bool) -> nn.Linear:
    module = nn.Linear(40, 33, bias=bias).requires_grad_(False)
    module.weight.data = random(33, 40, seed=1)
    if exact_in_bf16:
        module.weight.data = module.weight.data.bfloat16().float()
    if bias:
        module.bias.data = random(33, seed=2)
    return module


@pytest.mark.parametrize("exact_in_bf16", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (1, 7, 40), (2, 3, 40), (1, 0, 40)])
def test_a_packed_linear_equals_nn_linear(
    exact_in_bf16: bool, bias: bool, shape: tuple[int, ...], native: NativeKernels
) -> None:
    module, x = linear(exact_in_bf16, bias), random(*shape)
    got = packed(module, native)
    assert isinstance(got, PackedModule)
    torch.testing.assert_close(got(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exact_in_bf16", [True, False])
def test_a_weight_is_narrowed_only_where_that_loses_nothing(exact_in_bf16: bool, native: NativeKernels) -> None:
    module = linear(exact_in_bf16, bias=False)
    got = packed(module, native)
    assert isinstance(got, PackedModule)
    assert torch.equal(got.packed.unpack().float(), module.weight)
    width = 64 if native.has_tiles and exact_in_bf16 else 40  # a tile is 32 wide
    held = 64 * width * (2 if exact_in_bf16 else 4)  # 33 columns are padded to two panels
    assert got.nbytes == held


def test_one_inexact_value_keeps_the_whole_weight_in_fp32(native: NativeKernels) -> None:
    module = linear(exact_in_bf16=True, bias=False)
    module.weight.data[5, 5] = 1 + 2.0**-20
    got = packed(module, native)
    assert isinstance(got, PackedModule)
    assert torch.equal(got.packed.unpack(), module.weight)


def test_int8_rounds_linears_and_conv1ds_but_not_the_output_head(native: NativeKernels) -> None:
    model = tiny_model("gpt2")
    head, block = weight_of(model, "lm_head"), weight_of(model, "transformer.h.0.mlp.c_fc")
    pack_model(model, native, int8=True)
    assert torch.equal(weight_of(model, "lm_head"), head)
    assert torch.equal(weight_of(model, "transformer.h.0.mlp.c_fc"), Int8Weight.of(block).widened())


@pytest.mark.parametrize("exact_in_bf16", [True, False])
def test_a_packed_conv1d_equals_gpt2s(exact_in_bf16: bool, native: NativeKernels) -> None:
    module = Conv1D(33, 40).requires_grad_(False)
    module.weight.data = random(40, 33, seed=1)
    if exact_in_bf16:
        module.weight.data = module.weight.data.bfloat16().float()
    module.bias.data = random(33, seed=2)
    x = random(1, 6, 40)
    got = packed(module, native)
    assert isinstance(got, PackedModule)
    assert (got.in_features, got.out_features) == (40, 33)
    torch.testing.assert_close(got(x), module(x), rtol=1e-5, atol=1e-5)


def test_an_input_with_strides_is_taken(native: NativeKernels) -> None:
    module, x = linear(exact_in_bf16=False, bias=True), random(40, 6).T
    assert not x.is_contiguous()
    torch.testing.assert_close(packed(module, native)(x), module(x), rtol=1e-5, atol=1e-5)


def test_a_bf16_checkpoint_is_multiplied_in_fp32(native: NativeKernels) -> None:
    module = linear(exact_in_bf16=True, bias=True).bfloat16()
    x = random(1, 3, 40)
    expected = nn.functional.linear(x, module.weight.float(), module.bias.float())
    torch.testing.assert_close(packed(module, native)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_is_kept_in_its_dtype_and_read_in_fp32(dtype: torch.dtype, native: NativeKernels) -> None:
    module = nn.Embedding(11, 8).to(dtype)
    got = packed(module, native)
    assert isinstance(got, WideningEmbedding)
    assert got.weight.dtype is dtype
    ids = torch.tensor([[0, 10, 3]])
    assert got(ids).dtype is torch.float32
    assert torch.equal(got(ids), module(ids).float())


def test_an_fp32_embedding_that_fits_bf16_is_narrowed(native: NativeKernels) -> None:
    module = nn.Embedding(11, 8)
    module.weight.data = module.weight.data.bfloat16().float()
    got = packed(module, native)
    assert isinstance(got, WideningEmbedding)
    assert got.weight.dtype is torch.bfloat16
    assert torch.equal(got(torch.arange(11)), module.weight)


def test_a_subclass_that_does_something_of_its_own_is_left_alone(native: NativeKernels) -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 5.0

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2.0

    embedding, doubled = Scaled(11, 8).bfloat16(), Doubled(40, 33).bfloat16()
    assert packed(embedding, native) is embedding
    assert packed(doubled, native) is doubled
    assert embedding.weight.dtype is torch.float32  # widened, or fp32 activations could not go through
    assert doubled(random(1, 40)).dtype is torch.float32


def test_everything_else_becomes_fp32_buffers_included(native: NativeKernels) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
            self.register_buffer("table", torch.ones(3, dtype=torch.bfloat16))
            self.register_buffer("count", torch.ones(3, dtype=torch.int64))

    odd = Odd()
    pack_model(odd, native)
    assert [odd.scale.dtype, odd.table.dtype, odd.count.dtype] == [torch.float32, torch.float32, torch.int64]


def test_hooks_at_a_nested_module_can_be_attached_after_packing(native: NativeKernels) -> None:
    model = nn.Sequential(nn.Sequential(linear(exact_in_bf16=False, bias=False)), nn.ReLU())
    pack_model(model, native)
    seen: list[Tensor] = []
    model.get_submodule("0.0").register_forward_hook(lambda module, args, y: seen.append(y))
    model(random(1, 40))
    assert len(seen) == 1


def test_an_embedding_that_is_also_the_head_is_held_for_both(native: NativeKernels) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(33, 40), "head": nn.Linear(40, 33, bias=False)})
    model["head"].weight = model["embed"].weight
    expected = model["embed"].weight.detach().clone()
    pack_model(model, native)
    assert torch.equal(model["embed"].weight, expected)
    torch.testing.assert_close(model["head"](random(1, 40)), random(1, 40) @ expected.T, rtol=1e-5, atol=1e-5)
