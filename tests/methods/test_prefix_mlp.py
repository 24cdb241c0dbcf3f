"""The network behind a prefix against torch's own modules, and the checks of a prefix that is a table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import BaseShape, Checkpoint, Limits, Prefix
from server.methods.prefix_mlp import evaluate
from tests.methods.conftest import shape_of
from tests.tiny import tiny_model

WIDTH = 2 * 2 * 2 * 8  # layers, keys and values, heads, head size of the tiny llama


@pytest.fixture(scope="module")
def base() -> BaseShape:
    return shape_of(tiny_model("llama"))


def network(length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"table": (length, 32), "down": (5, 32), "down_bias": (5,), "up": (WIDTH, 5), "up_bias": (WIDTH,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_network_is_two_linears_and_an_activation() -> None:
    stored = network(3)
    down, up = nn.Linear(32, 5), nn.Linear(5, WIDTH)
    tensors = {"0.weight": stored["down"], "0.bias": stored["down_bias"], "2.weight": stored["up"], "2.bias": stored["up_bias"]}
    library = nn.Sequential(down, nn.Tanh(), up)
    library.load_state_dict(tensors)
    expected = library(stored["table"]).detach()
    assert torch.allclose(evaluate(Checkpoint("prefix_tuning", {"activation": "tanh"}, loose=stored)), expected)


def test_a_table_alone_is_the_prefix_in_single_precision() -> None:
    table = torch.ones(2, WIDTH, dtype=torch.float16)
    found = evaluate(Checkpoint("prefix_tuning", {}, loose={"table": table}))
    assert found.dtype is torch.float32
    assert torch.equal(found, table.float())


def read(base: BaseShape, tensors: dict[str, Tensor], limit: int = 512) -> Prefix:
    checkpoint = Checkpoint("prefix_tuning", {"positions": 0, "activation": "tanh"}, loose=tensors)
    prefix = METHODS["prefix_tuning"].read(checkpoint, base, Limits(max_virtual_tokens=limit)).prefix
    assert prefix is not None
    return prefix


def test_the_text_behind_it_is_not_moved(base: BaseShape) -> None:
    prefix = read(base, network(3))
    assert (prefix.length, prefix.positions, prefix.shift) == (3, 0, 3)
    flat = evaluate(Checkpoint("prefix_tuning", {"activation": "tanh"}, loose=network(3)))
    assert prefix.keys is not None
    assert torch.equal(prefix.keys[1, 2, 1], flat.view(3, 2, 2, 2, 8)[2, 1, 0, 1])


def test_a_prefix_moves_the_text_by_its_length_unless_told_otherwise() -> None:
    assert Prefix(7).shift == 0
    assert Prefix(7, positions=7).shift == 0
    assert Prefix(7, positions=0).shift == 7


def test_the_limit_is_checked_before_the_network_runs(base: BaseShape) -> None:
    stored = {**network(9), "up": torch.zeros(1)}
    with pytest.raises(AdapterError, match=r"^prefix_length: 9 is over this server's limit of 8"):
        read(base, stored, limit=8)


def test_a_network_that_overflows_is_refused(base: BaseShape) -> None:
    stored = network(2)
    with pytest.raises(AdapterError, match=r"^prefix_length: .* overflows"):
        read(base, {**stored, "up": stored["up"] * 1e38, "up_bias": stored["up_bias"] * 1e38})
