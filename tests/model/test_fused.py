"""Fused norms and gates: put in where they compute the same, never where a module only looks the part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from server.model.fused import fuse_model
from server.model.native import NativeKernels, NativeUnavailable, open_library
from server.settings import default_home

WIDTH = 24


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    torch.set_num_threads(1)
    try:
        return open_library(default_home(), lambda line: None)
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


def randomised(module: nn.Module, std: float = 0.5) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.requires_grad_(False).parameters():
        parameter.data.normal_(mean=0.3 if parameter.ndim == 1 else 0.0, std=std, generator=generator)
    return module


class MLP(nn.Module):
    """Llama's, with the activation given."""

    def __init__(self, act: str | nn.Module, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 40, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(40, WIDTH, bias=bias)
        self.act_fn = ACT2FN[act] if isinstance(act, str) else act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def is_fused(module: nn.Module, native: NativeKernels) -> bool:
    """Whether `fuse_model` gave the module a fused forward; what it computes must not change either way."""
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(9)) * 2
    expected = module(x)
    count = fuse_model(module, native)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert ("forward" in vars(module)) == bool(count)
    return bool(count)


@pytest.mark.parametrize(
    "module",
    [
        LlamaRMSNorm(WIDTH, eps=1e-6),
        LlamaRMSNorm(WIDTH, eps=1e-2),
        GemmaRMSNorm(WIDTH, eps=1e-6),
        nn.LayerNorm(WIDTH),
        nn.LayerNorm(WIDTH, bias=False),
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        MLP("silu"),
        MLP("silu", bias=True),
        MLP("gelu_pytorch_tanh"),
        MLP("gelu_new"),
    ],
    ids=lambda module: f"{type(module).__name__} {getattr(module, 'act_fn', '')}",
)
def test_norms_and_gated_feed_forwards_are_fused(module: nn.Module, native: NativeKernels) -> None:
    assert is_fused(randomised(module), native)


class EpsOutside(LlamaRMSNorm):
    """x / (rms + eps) and not x / sqrt(rms^2 + eps): equal but for small inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Centred(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Clamped(LlamaRMSNorm):
    """Equal but for large inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-50, 50))


class Residual(LlamaRMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(x) if residual is None else super().forward(x + residual)


class ScaledLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class ClippedGate(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class Swapped(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


@pytest.mark.parametrize(
    "module",
    [
        EpsOutside(WIDTH, eps=1e-5),
        Centred(WIDTH),
        Clamped(WIDTH),
        ScaledLayerNorm(WIDTH),
        nn.LayerNorm((5, WIDTH)),
        nn.BatchNorm1d(WIDTH).eval(),
        ClippedGate("silu"),
        Swapped("silu"),
        MLP("relu"),
        MLP("gelu"),
        MLP("quick_gelu"),
        MLP(nn.SiLU()).double(),
    ],
    ids=lambda module: f"{type(module).__name__} {getattr(module, 'act_fn', '')}",
)
def test_what_only_looks_the_part_is_left_alone(module: nn.Module, native: NativeKernels) -> None:
    randomised(module)
    assert fuse_model(module, native) == 0
    assert "forward" not in vars(module)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu"])
def test_small_weights_do_not_hide_another_activation(activation: str, native: NativeKernels) -> None:
    """Near zero every gate is half its input: an activation shows only where the gate is large."""
    assert fuse_model(randomised(MLP(activation), std=0.02), native) == 0


def test_adapters_hooks_keep_running_inside_a_fused_feed_forward(native: NativeKernels) -> None:
    module = randomised(MLP("silu"))
    x = torch.randn(1, 4, WIDTH)
    module.up_proj.register_forward_hook(lambda m, args, y: y + 1.0)
    expected = module(x)
    assert fuse_model(module, native) == 1
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_takes_strided_input(native: NativeKernels) -> None:
    module = randomised(LlamaRMSNorm(WIDTH))
    x = torch.randn(WIDTH, 6).T
    expected = module(x)
    assert fuse_model(module, native) == 1
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_every_module_of_a_model_is_looked_at(native: NativeKernels) -> None:
    model = nn.Sequential(randomised(LlamaRMSNorm(WIDTH)), nn.Sequential(randomised(MLP("silu")), nn.LayerNorm(WIDTH)))
    assert fuse_model(model, native) == 3
