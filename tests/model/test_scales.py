"""What norms and embeddings do with their weights, on modules of every kind transformers and torch have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from server.model.loader import make_base
from server.model.scales import embedding_gain, norm_offset
from tests.lab import BASE
from tests.tiny import tiny_model


class Distance(nn.Module):
    """A norm that stores its scale's distance from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt() * (1.0 + self.weight)


class Squared(Distance):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight**2


class Asks(Distance):
    def forward(self, x: torch.Tensor, more: int) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("module", "offset"),
    [(nn.LayerNorm(6), 0.0), (nn.RMSNorm(6), 0.0), (Distance(), 1.0), (Squared(), None), (Asks(), None)],
)
def test_an_offset_is_measured_or_none(module: nn.Module, offset: float | None) -> None:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert norm_offset(module, 6) == offset
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_bias_is_left_out_of_the_measure() -> None:
    module = nn.LayerNorm(6)
    module.bias.data.fill_(3.0)
    assert norm_offset(module, 6) == 0.0
    assert module.bias[0] == 3.0


class Scaled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 5.5


class Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 2)


class Added(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1.0


@pytest.mark.parametrize(
    ("module", "gain"),
    [
        (nn.Embedding(9, 6), 1.0),
        (nn.Embedding(9, 6, padding_idx=8), 1.0),
        (nn.Embedding(9, 6, dtype=torch.bfloat16), 1.0),
        (Scaled(9, 6), 5.5),
        (Shifted(9, 6), None),
        (Added(9, 6), None),
    ],
)
def test_a_gain_is_measured_or_none(module: nn.Module, gain: float | None) -> None:
    assert embedding_gain(module, 6) == gain


@pytest.mark.parametrize(
    ("architecture", "offset", "gain"),
    [
        ("llama", 0.0, 1.0),
        ("gemma", 1.0, math.sqrt(32)),
        ("gemma2", 1.0, math.sqrt(32)),
        ("opt", 0.0, 1.0),
        ("cohere", 0.0, 1.0),
    ],
)
def test_real_models_are_understood(architecture: str, offset: float, gain: float) -> None:
    model: PreTrainedModel = tiny_model(architecture)
    shape = make_base(model, BASE, torch.device("cpu"), torch.float32).shape
    assert {module.offset for module in shape.modules.values() if module.kind == "norm"} == {offset}
    assert shape.modules[shape.embedding].gain == pytest.approx(gain, rel=1e-6)
    assert shape.modules[shape.head].out_features == shape.vocab_size


def test_positions_that_are_no_plain_table_are_seen() -> None:
    shape = make_base(tiny_model("opt"), BASE, torch.device("cpu"), torch.float32).shape
    assert shape.modules["model.decoder.embed_positions"].gain is None
