"""The base in int8: torch's twin equals the native one, what is rounded and what is not, and that it is another base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters_store.digest import Digest
from server.model.kernels import Kernels, choose_kernels, with_int8
from server.model.linear import PackedModule
from server.model.loader import load_base, make_base, rounded, weight_of
from server.model.native.int8 import Int8Weight
from server.model.quantized import QuantizedModule, quantize_model
from server.settings import default_home
from tests.lab import BASE, Lab
from tests.tiny import tiny_model

CPU = torch.device("cpu")
PROMPT = [5, 9, 33, 60, 12, 71, 8]
TORCH = with_int8(Kernels("torch"), torch.float32)


@pytest.fixture(scope="module")
def native() -> Kernels:
    torch.set_num_threads(1)
    chosen = choose_kernels(CPU, torch.float32, True, default_home(), lambda line: None, int8=True)
    if chosen.name != "native":
        pytest.skip(chosen.name)
    return chosen


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- rounding ----


def test_every_value_is_off_by_half_a_step_at_most() -> None:
    weight = random(33, 40) * torch.logspace(-4, 3, 33)[:, None]
    found = Int8Weight.of(weight)
    assert found.values.dtype is torch.int8
    assert ((found.widened() - weight).abs() <= found.scales[:, None] * 0.5001).all()
    assert found.values.abs().amax(1).eq(127).all()  # the largest of each channel uses the whole range


def test_a_channel_of_zeros_stays_one_and_a_rounded_weight_stays_itself() -> None:
    weight = random(5, 8)
    weight[2] = 0
    once = Int8Weight.of(weight)
    assert not once.widened()[2].any()
    again = Int8Weight.of(once.widened())
    assert torch.equal(again.values, once.values)


# ---- modules ----


def small_model(bias: bool) -> nn.Sequential:
    conv = Conv1D(33, 24).requires_grad_(False)
    conv.bias.data = random(33, seed=3)
    return nn.Sequential(nn.Linear(40, 24, bias=bias), conv, nn.LayerNorm(33)).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
def test_linears_and_conv1ds_multiply_with_the_rounded_weight(bias: bool) -> None:
    model, x = small_model(bias), random(1, 6, 40)
    linear, conv = model[0], model[1]
    middle = x @ Int8Weight.of(linear.weight).widened().T + (linear.bias if bias else 0)
    expected = model[2](middle @ Int8Weight.of(conv.weight.T).widened().T + conv.bias)
    quantize_model(model, torch.float32)
    assert [type(module) for module in model] == [QuantizedModule, QuantizedModule, nn.LayerNorm]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_activations_keep_their_dtype_and_buffers_their_precision() -> None:
    model = small_model(bias=True)
    model.register_buffer("frequencies", torch.ones(3))
    quantize_model(model, torch.bfloat16)
    assert model(random(1, 40).bfloat16()).dtype is torch.bfloat16
    assert model[2].weight.dtype is torch.bfloat16
    assert model.frequencies.dtype is torch.float32
    assert model[0].scales.dtype is torch.float32


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_head_embeddings_and_norms_are_left_alone(architecture: str) -> None:
    model = tiny_model(architecture)
    head = model.get_output_embeddings()
    quantize_model(model, torch.float32)
    assert model.get_output_embeddings() is head
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}
    assert kinds <= {nn.Linear}
    assert sum(isinstance(module, QuantizedModule) for module in model.modules()) == {"llama": 14, "gpt2": 8}[architecture]


# ---- the base ----


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_both_twins_give_the_logits_of_a_base_with_rounded_weights(architecture: str, native: Kernels) -> None:
    plain = tiny_model(architecture)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not plain.get_output_embeddings():
            wide = Int8Weight.of(weight_of(plain, name)).widened()
            module.weight.data = wide.T if isinstance(module, Conv1D) else wide
    expected = plain(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    tokens = []
    for kernels in (native, TORCH):
        lab = Lab(tiny_model(architecture), {}, kernels=kernels)
        lab.submit("a", PROMPT, max_new_tokens=8)
        lab.run()
        torch.testing.assert_close(lab.logits("a")[0], expected, rtol=1e-4, atol=1e-4)
        tokens.append(lab.tokens("a"))
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("twin", ["native", "torch"])
def test_weights_read_from_a_rounded_base_are_those_it_multiplies_with(twin: str, native: Kernels) -> None:
    plain, model = tiny_model("llama"), tiny_model("llama")
    base = make_base(model, BASE, CPU, torch.float32, (native if twin == "native" else TORCH).prepare)
    name = "model.layers.0.mlp.up_proj"
    assert isinstance(model.get_submodule(name), PackedModule if twin == "native" else QuantizedModule)
    assert torch.equal(base.shape.weight(name), Int8Weight.of(weight_of(plain, name)).widened())
    assert torch.equal(base.shape.weight("lm_head"), weight_of(plain, "lm_head"))


def test_a_rounded_base_has_a_digest_of_its_own_and_half_the_bytes(tmp_path: Path, native: Kernels) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    plain = choose_kernels(CPU, torch.float32, True, default_home(), lambda line: None)
    whole = load_base(tmp_path, CPU, torch.float32, plain.prepare)
    small = load_base(tmp_path, CPU, torch.float32, native.prepare, native.int8)
    assert small.shape.digest == rounded(whole.shape.digest) != whole.shape.digest
    assert rounded(Digest("0" * 64)) != rounded(Digest("1" * 64))
    name = "model.layers.0.mlp.up_proj"
    sizes = [base.model.get_submodule(name).nbytes for base in (whole, small)]
    assert sizes == [2 * 64 * 32, 64 * 32 + 4 * 64]


def test_native_rows_of_a_rounded_base_keep_their_bits_in_company(native: Kernels) -> None:
    def logits(mates: int, budget: int) -> Tensor:
        lab = Lab(tiny_model("llama"), {}, kernels=native, max_batch_tokens=budget)
        lab.submit("me", PROMPT, max_new_tokens=8)
        for i in range(mates):
            lab.submit(f"mate {i}", PROMPT[: 1 + i % 7], max_new_tokens=3 + i % 5)
        lab.run()
        return lab.logits("me")

    assert torch.equal(logits(31, 300), logits(0, 300))
    assert torch.equal(logits(0, 2), logits(0, 300))
