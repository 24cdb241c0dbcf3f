"""Norms replaced by trained ones: exact against torch's own norms, refused where the base has nothing to scale."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import BaseShape, Checkpoint, Limits, ModuleShape, Part
from server.methods.grouped import rows_of
from server.methods.ln_tuning import NormOp

CPU = torch.device("cpu")
WEIGHTS = {
    "layer.rms": torch.tensor([1.0, 2.0, -0.5, 0.25]),
    "layer.ln": torch.tensor([1.0, 2.0, -0.5, 0.25]),
    "layer.gemma": torch.tensor([0.0, -0.5, 1.0, 0.25]),
    "layer.dead": torch.tensor([1.0, 0.0, 1.0, 1.0]),
    "layer.odd": torch.ones(4),
    "layer.q_norm": torch.ones(2),
}
BIAS = torch.tensor([0.5, -1.0, 0.0, 2.0])


def base(bias: Tensor = BIAS) -> BaseShape:
    modules = {
        "layer.rms": ModuleShape("norm", 4, 4),
        "layer.ln": ModuleShape("norm", 4, 4, bias),
        "layer.gemma": ModuleShape("norm", 4, 4, offset=1.0),
        "layer.dead": ModuleShape("norm", 4, 4),
        "layer.odd": ModuleShape("norm", 4, 4, offset=None),
        "layer.q_norm": ModuleShape("norm", 2, 2),
        "layer.q": ModuleShape("linear", 4, 3),
    }
    return BaseShape(Digest("0" * 64), "tiny", 4, 1, 2, 2, 2, 9, 32, modules, weight=WEIGHTS.__getitem__)


def read(module: str, shape: BaseShape | None = None, **tensors: Tensor) -> Part:
    return METHODS["ln_tuning"].read(Checkpoint("ln_tuning", {}, {module: tensors}), shape or base(), Limits())


def applied(part: Part, module: str, y: Tensor) -> Tensor:
    op = NormOp(4, CPU, torch.float32)
    op.grow(3)
    op.put(2, part.sites[module])
    return op.after(y, y.clone(), rows_of([2] * len(y)))


def test_a_layer_norm_becomes_the_trained_one():
    old, new = nn.LayerNorm(4), nn.LayerNorm(4)
    old.weight.data, old.bias.data = WEIGHTS["layer.ln"], BIAS
    new.weight.data, new.bias.data = torch.randn(4), torch.randn(4)
    x = torch.randn(5, 4) * 3
    part = read("layer.ln", weight=new.weight.data, bias=new.bias.data)
    assert part.pool == "norm"
    with torch.no_grad():
        torch.testing.assert_close(applied(part, "layer.ln", old(x)), new(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("module", "offset"), [("layer.rms", 0.0), ("layer.gemma", 1.0)])
def test_an_rms_norm_is_scaled_by_the_ratio_of_what_the_weights_mean(module, offset):
    n, weight = torch.randn(5, 4), torch.tensor([0.5, 3.0, -2.0, 0.0])
    part = read(module, weight=weight.to(torch.bfloat16))
    torch.testing.assert_close(applied(part, module, n * (offset + WEIGHTS[module])), n * (offset + weight))


def test_what_did_not_change_is_left_alone_to_the_bit():
    assert read("layer.rms", weight=WEIGHTS["layer.rms"]).sites == {}
    assert read("layer.q_norm", weight=torch.ones(2)).sites == {}  # not adaptable, and not adapted
    weight = WEIGHTS["layer.dead"].clone()
    weight[2] = 5.0  # the dead channel stays dead
    site = read("layer.dead", weight=weight).sites["layer.dead"]
    assert site["scale"].tolist() == [1.0, 1.0, 5.0, 1.0]
    assert site["shift"].tolist() == [0.0] * 4
    moved = read("layer.ln", weight=WEIGHTS["layer.ln"], bias=BIAS + 1).sites["layer.ln"]
    assert (moved["scale"].tolist(), moved["shift"].tolist()) == ([1.0] * 4, [1.0] * 4)


@pytest.mark.parametrize(
    ("module", "tensors", "message"),
    [
        ("layer.dead", {"weight": torch.ones(4) * 2}, r"^layer.dead.weight: channel 1 is 2, but zero in the base"),
        ("layer.rms", {"weight": torch.ones(5)}, r"^layer.rms.weight: has shape \[5\], the base model needs \[4\]"),
        ("layer.rms", {"weight": torch.ones(4), "bias": torch.ones(4)}, r"^layer.rms.bias: is stored, but .* has no bias"),
        ("layer.ln", {"weight": torch.ones(4)}, r"^layer.ln.bias: is missing although the weight is there"),
        ("layer.ln", {"bias": torch.ones(4)}, r"^layer.ln.weight: is missing although the bias is there"),
        ("layer.ln", {"weight": torch.ones(4), "bias": torch.ones(3)}, r"^layer.ln.bias: has shape \[3\]"),
        ("layer.q_norm", {"weight": torch.ones(2) * 2}, r"^layer.q_norm.weight: .* normalises heads"),
        ("layer.odd", {"weight": torch.ones(4) * 2}, r"^layer.odd.weight: .*does not scale by its weight as a norm does"),
        ("layer.q", {"weight": torch.ones(3, 4)}, r"^layer.q.weight: 'layer.q' is a module of kind linear; supported: norm"),
        ("layer.x", {"weight": torch.ones(4)}, r"^layer.x.weight: .* has no module 'layer.x'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(module, tensors, message):
    with pytest.raises(AdapterError, match=message):
        read(module, **tensors)


def test_an_upload_without_norms_is_refused():
    with pytest.raises(AdapterError, match=r"^ln_tuning: the upload holds no norms"):
        METHODS["ln_tuning"].read(Checkpoint("ln_tuning", {}), base(), Limits())


def test_a_channel_that_drowned_in_the_bases_bias_is_refused():
    """y = n * 1e-6 + 0.5 in fp32 holds nothing of n that could be scaled up again."""
    tiny = replace(base(), weight=lambda module: torch.tensor([1e-6, 1.0, 1.0, 1.0]))
    with pytest.raises(AdapterError, match=r"^layer.ln.weight: channel 0 is too small in the base to be scaled to 1$"):
        read("layer.ln", tiny, weight=torch.ones(4), bias=BIAS)
    small = replace(base(bias=torch.zeros(4)), weight=lambda module: torch.full((4,), 1e-6))
    assert read("layer.ln", small, weight=torch.ones(4), bias=torch.zeros(4)).sites["layer.ln"]["scale"][0] == pytest.approx(
        1e6
    )
    none = replace(base(), weight=lambda module: torch.full((4,), 1e-38))
    with pytest.raises(AdapterError, match="too small in the base"):
        read("layer.rms", none, weight=torch.full((4,), 1e4))


def test_nan_stays_in_its_own_rows_and_leaves_with_its_adapter():
    op = NormOp(3, CPU, torch.float32)
    op.grow(3)
    op.put(1, {"scale": torch.full((3,), math.nan), "shift": torch.zeros(3)})
    op.put(2, {"scale": torch.full((3,), 2.0), "shift": torch.ones(3)})
    rows = rows_of([1, 0, 2, 1])
    assert op.after(torch.ones(4, 3), torch.ones(4, 3), rows).isnan().any(1).tolist() == [True, False, False, True]
    assert op.nbytes == 2 * op.scale.nbytes
    op.clear(1)
    out = op.after(torch.ones(4, 3), torch.ones(4, 3), rows_of([1, 0, 2, 1]))
    assert out[:, 0].tolist() == [1.0, 1.0, 3.0, 1.0]
