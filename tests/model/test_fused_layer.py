"""Slim attention and layers: put in where they compute the same, and adapters' hooks keep running through them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from server.model.fused_layer import fuse_layers
from server.model.kernels import Kernels, choose_kernels
from server.model.native import NativeKernels, NativeUnavailable, open_library
from server.settings import default_home
from tests.lab import Lab
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    torch.set_num_threads(1)
    try:
        return open_library(default_home(), lambda line: None)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


def prepared(name: str) -> nn.Module:
    model = tiny_model(name).eval()
    model.config._attn_implementation = "adapterd"
    return model


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("llama", ["LlamaAttention", "LlamaDecoderLayer"] * 2),
        ("qwen2", ["Qwen2Attention", "Qwen2DecoderLayer"] * 2),
        ("gemma", ["GemmaAttention", "GemmaDecoderLayer"] * 2),
        ("gpt2", []),
        ("opt", []),
        ("gpt_neox", []),
    ],
)
@torch.inference_mode()
def test_only_what_computes_the_same_is_replaced(name: str, fused: list[str], native: NativeKernels) -> None:
    model = prepared(name)
    assert fuse_layers(model, native) == len(fused)
    replaced = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    assert sorted(replaced) == sorted(fused)


@torch.inference_mode()
def test_a_layer_that_does_more_is_left_alone(native: NativeKernels) -> None:
    model = prepared("llama")
    odd = model.model.layers[1]
    plain = type(odd).forward
    odd.forward = lambda *args, **kwargs: 1.01 * plain(odd, *args, **kwargs)
    kept = odd.forward
    assert fuse_layers(model, native) == 3
    assert odd.forward is kept


@torch.inference_mode()
def test_attention_that_does_more_is_left_alone(native: NativeKernels) -> None:
    model = prepared("llama")
    odd = model.model.layers[0].self_attn
    plain = type(odd).forward
    odd.forward = lambda *args, **kwargs: (plain(odd, *args, **kwargs)[0] + 0.1, None)
    kept = odd.forward
    assert fuse_layers(model, native) == 3
    assert odd.forward is kept


def test_hooks_of_projections_and_norms_run(native: NativeKernels) -> None:
    chosen = choose_kernels(torch.device("cpu"), torch.float32, True, default_home(), lambda line: None)

    def logits(kernels: Kernels) -> Tensor:
        model = tiny_model("llama")
        lab = Lab(model, {}, kernels=kernels)
        layer = model.model.layers[1]
        for module in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.post_attention_layernorm):
            module.register_forward_hook(lambda m, args, y: y * 1.5)
        lab.submit("a", [5, 6, 7, 8, 9], max_new_tokens=3)
        lab.run()
        return lab.logits("a")

    torch.testing.assert_close(logits(chosen), logits(Kernels("torch")), rtol=1e-4, atol=1e-4)
