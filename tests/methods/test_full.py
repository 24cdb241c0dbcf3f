"""Whole modules of one's own: exact products and rows, nothing kept that is the base's, refusals by name."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS, build_methods
from server.methods.base import BaseShape, Checkpoint, Limits, ModuleShape, Op, Part
from server.methods.grouped import rows_of
from server.methods.maps import TorchLinear

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(3)
WEIGHTS = {
    "layer.q": torch.randn(3, 4, generator=GENERATOR),
    "layer.c": torch.randn(3, 4, generator=GENERATOR),
    "layer.e": torch.randn(9, 4, generator=GENERATOR),
    "layer.scaled": torch.randn(9, 4, generator=GENERATOR),
    "layer.odd": torch.randn(9, 4, generator=GENERATOR),
    "lm_head": torch.randn(9, 4, generator=GENERATOR),
}
BIAS = torch.tensor([1.0, 2.0, 3.0])


def base() -> BaseShape:
    modules = {
        "layer.q": ModuleShape("linear", 4, 3),
        "layer.c": ModuleShape("conv1d", 4, 3, BIAS),
        "layer.e": ModuleShape("embedding", 9, 4),
        "layer.scaled": ModuleShape("embedding", 9, 4, gain=2.0),
        "layer.odd": ModuleShape("embedding", 9, 4, gain=None),
        "layer.norm": ModuleShape("norm", 4, 4),
        "lm_head": ModuleShape("linear", 4, 9),
    }
    return BaseShape(Digest("0" * 64), "tiny", 4, 1, 2, 2, 2, 9, 32, modules, weight=WEIGHTS.__getitem__)


def read(module: str, limits: Limits | None = None, **tensors: Tensor) -> Part:
    return METHODS["full"].read(Checkpoint("full", {}, {module: tensors}), base(), limits or Limits())


def op(part: Part, module: str) -> Op:
    made = METHODS["full"].op(part, module, base(), CPU, torch.float32)
    made.grow(4)
    return made


@pytest.mark.parametrize("module", ["layer.q", "lm_head"])
def test_rows_go_through_their_own_matrix(module):
    out = base().modules[module].out_features
    one, two = torch.randn(out, 4), torch.randn(out, 4)
    parts = [read(module, weight=weight) for weight in (one, two.to(torch.bfloat16))]
    assert {part.pool for part in parts} == {"full"}
    made = op(parts[0], module)
    for slot, part in enumerate(parts, 1):
        made.put(slot, part.sites[module])
    x, y = torch.randn(4, 4), torch.randn(4, out)
    got = made.after(x, y.clone(), rows_of([1, 0, 2, 1]))
    expected = torch.stack([one @ x[0], y[1], two.to(torch.bfloat16).float() @ x[2], one @ x[3]])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert made.nbytes == 2 * 4 * out * 4


def test_a_conv1d_is_stored_the_other_way_round():
    weight, bias = torch.randn(4, 3), torch.randn(3)
    part = read("layer.c", weight=weight, bias=bias)
    made = op(part, "layer.c")
    made.put(1, part.sites["layer.c"])
    x = torch.randn(2, 4)
    torch.testing.assert_close(made.after(x, torch.zeros(2, 3), rows_of([1, 1])), x @ weight + bias)


@pytest.mark.parametrize(("module", "gain"), [("layer.e", 1.0), ("layer.scaled", 2.0)])
def test_an_embedding_gives_the_rows_of_its_own_table(module, gain):
    tables = torch.randn(9, 4), torch.randn(9, 4).to(torch.bfloat16)
    made = op(read(module, weight=tables[0]), module)
    for slot, table in enumerate(tables, 1):
        made.put(slot, read(module, weight=table).sites[module])
    ids = torch.tensor([5, 6, 7, 5])
    got = made.after(ids, torch.full((4, 4), 9.0), rows_of([1, 0, 2, 2]))
    expected = torch.stack([tables[0][5], torch.full((4,), 9.0 / gain), tables[1][7].float(), tables[1][5].float()])
    assert torch.equal(got, expected * gain)
    assert made.nbytes == 9 * 4 * (4 + 2)
    made.clear(2)
    assert torch.equal(made.after(ids, torch.ones(4, 4), rows_of([0, 0, 2, 2])), torch.ones(4, 4))


def test_what_is_the_bases_own_is_left_out():
    assert read("layer.q", weight=WEIGHTS["layer.q"]).sites == {}
    assert read("layer.c", weight=WEIGHTS["layer.c"].T.contiguous(), bias=BIAS).sites == {}
    assert read("layer.odd", weight=WEIGHTS["layer.odd"]).sites == {}
    assert read("layer.c", weight=WEIGHTS["layer.c"].T.contiguous(), bias=BIAS + 1).sites.keys() == {"layer.c"}
    assert read("layer.q", Limits(max_full_bytes=0), weight=WEIGHTS["layer.q"]).pool == "full"


@pytest.mark.parametrize(
    ("module", "tensors", "message"),
    [
        ("layer.q", {"weight": torch.ones(4, 3)}, r"^layer.q.weight: has shape \[4, 3\], the base model needs \[3, 4\]"),
        ("layer.c", {"weight": torch.ones(3, 4), "bias": BIAS}, r"^layer.c.weight: has shape \[3, 4\], .*needs \[4, 3\]"),
        ("layer.c", {"weight": torch.ones(4, 3)}, r"^layer.c.bias: is missing although the weight is there"),
        ("layer.q", {"weight": torch.ones(3, 4), "bias": BIAS}, r"^layer.q.bias: is stored, but .* has no bias"),
        ("layer.q", {"bias": BIAS}, r"^layer.q.weight: is missing although the bias is there|has no bias"),
        ("lm_head", {"weight": torch.ones(10, 4)}, r"^lm_head.weight: has shape \[10, 4\], the base model needs \[9, 4\]"),
        ("layer.odd", {"weight": torch.ones(9, 4)}, r"^layer.odd.weight: .*is not a plain table of rows"),
        ("layer.norm", {"weight": torch.ones(4)}, r"^layer.norm.weight: .*kind norm; supported: linear, conv1d, embedding"),
        ("layer.x", {"weight": torch.ones(4)}, r"^layer.x.weight: .* has no module 'layer.x'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(module, tensors, message):
    with pytest.raises(AdapterError, match=message):
        read(module, **tensors)


def test_an_upload_may_hold_so_much_and_no_more():
    sites = {"layer.q": {"weight": torch.ones(3, 4)}, "lm_head": {"weight": torch.ones(9, 4)}}
    checkpoint = Checkpoint("full", {}, sites)
    METHODS["full"].read(checkpoint, base(), Limits(max_full_bytes=192))
    with pytest.raises(AdapterError, match=r"^lm_head: brings the whole matrices to 192 bytes, over the limit of 191"):
        METHODS["full"].read(checkpoint, base(), Limits(max_full_bytes=191))


def test_nan_stays_in_its_own_rows_and_leaves_with_its_adapter():
    part = read("layer.q", weight=torch.ones(3, 4))
    made = op(part, "layer.q")
    made.put(1, {"weight": torch.full((3, 4), math.nan)})
    made.put(2, part.sites["layer.q"])
    rows = rows_of([1, 0, 2, 1])
    assert made.after(torch.ones(4, 4), torch.ones(4, 3), rows).isnan().any(1).tolist() == [True, False, False, True]
    made.clear(1)
    assert not made.after(torch.ones(4, 4), torch.ones(4, 3), rows_of([1, 0, 2, 1])).isnan().any()
    assert made.nbytes == 48


def test_a_native_map_takes_the_place_of_the_torch_product():
    calls = []

    def linear(weight: Tensor, bias: Tensor | None) -> TorchLinear:
        calls.append(weight.dtype)
        return TorchLinear(weight.float(), bias)

    part = read("layer.c", weight=torch.ones(4, 3).to(torch.bfloat16), bias=BIAS)
    made = build_methods(linear=linear)["full"].op(part, "layer.c", base(), CPU, torch.float32)
    made.put(1, part.sites["layer.c"])
    x = torch.randn(2, 4)
    expected = F.linear(x, torch.ones(3, 4), BIAS)
    assert torch.equal(made.after(x, torch.zeros(2, 3), rows_of([1, 1])), expected)
    assert calls == [torch.bfloat16]
