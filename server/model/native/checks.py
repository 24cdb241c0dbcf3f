"""The self-check: every kernel against its torch twin on small inputs, before the library may serve.

Owns what counts as right (closeness, and equal bits alone and in company). A compiler bug or a stale prebuilt library
stops here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .build import NativeUnavailable
from .int8 import Int8Weight
from .layouts import CacheSize, make_caches
from .library import NativeKernels
from .prepared import Split

TOLERANCE = 1e-4  # absolute, on values of size about 1 after sums of at most 70 products


def self_check(kernels: NativeKernels) -> None:
    """Raises: NativeUnavailable naming the first kernel whose result is wrong."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for name, check in _CHECKS.items():
        got, want = check(kernels, random)
        if got.shape != want.shape or not torch.allclose(got, want, rtol=0, atol=TOLERANCE):
            raise NativeUnavailable(f"the self-check of {name} failed: off by {(got - want).abs().max():.3g}")


Random = Callable[..., Tensor]
Pair = tuple[Tensor, Tensor]


def _linear(kernels: NativeKernels, random: Random) -> Pair:
    x, weight, bias = random(14, 37), random(70, 37), random(70)
    packed = [kernels.packed_linear(w, bias) for w in (weight, weight.bfloat16())]
    got = torch.cat([linear(x) for linear in packed] + [linear(x[13:]) for linear in packed])
    want = [reference.linear(x, weight, bias), reference.linear(x, weight.bfloat16(), bias)]
    if not torch.equal(got[28], got[13]) or not torch.equal(got[29], got[27]):
        raise NativeUnavailable("the self-check of linear failed: a row's bits depend on the number of rows")
    return got, torch.cat([*want, want[0][13:], want[1][13:]])


def _tiles(kernels: NativeKernels, random: Random) -> Pair:
    """A tiled bf16 weight, for rows before a prompt and for few and many rows of one."""
    if not kernels.has_tiles:
        return torch.empty(0), torch.empty(0)
    many = 64 * torch.get_num_threads() + 14
    x, weight, bias, split = random(many, 37), random(70, 37).bfloat16(), random(70), Split()
    linear, plain = kernels.packed_linear(weight, bias, tiles=True), kernels.packed_linear(weight, bias)
    linear.tile(split)
    if not torch.equal(linear(x), plain(x)):
        raise NativeUnavailable("the self-check of tiles failed: rows of no prompt have other bits than without tiles")
    split.first, split.rows = 5, many
    got = linear(x)
    split.first, split.rows = 0, 2
    if not torch.equal(got[:5], plain(x[:5])) or not torch.equal(linear(x[13:15]), got[13:15]):
        raise NativeUnavailable("the self-check of tiles failed: a row's bits depend on the other rows")
    return got, reference.linear(x, weight, bias)


def _lora(kernels: NativeKernels, random: Random) -> Pair:
    x, got, a, b = random(9, 37), random(9, 70), random(4, 5, 37), random(4, 5, 70)
    want = got.clone()
    index, slot = torch.tensor([8, 0, 1, 2, 4, 5, 6]), torch.tensor([0, 1, 1, 1, 1, 1, 3])
    kernels.lora(x, got, a, b, index, slot)
    reference.lora(x, want, a, b, index, slot)
    return got, want


def _int8(kernels: NativeKernels, random: Random) -> Pair:
    x, weight, bias = random(14, 37), Int8Weight.of(random(70, 37)), random(70)
    linear = kernels.packed_linear(weight, bias)
    got = linear(x)
    if not torch.equal(linear(x[13:]), got[13:]):
        raise NativeUnavailable("the self-check of int8 failed: a row's bits depend on the number of rows")
    return got, reference.linear(x, weight.widened(), bias)


def _bottleneck(kernels: NativeKernels, random: Random) -> Pair:
    index, slot = torch.tensor([8, 0, 1, 2, 4, 5, 6]), torch.tensor([0, 1, 1, 1, 1, 1, 3])
    x, y = random(9, 70), random(9, 70)
    weights = random(4, 5, 70) * 0.1, random(4, 5), random(4, 5, 70), random(4, 70)
    both = []
    for name, activation in _TRIED.items():
        both.append((y.clone(), y.clone()))
        kernels.bottleneck(x, both[-1][0], name, weights, index, slot)
        reference.bottleneck(x, both[-1][1], activation, weights, index, slot)
    return torch.cat([got for got, _ in both]), torch.cat([want for _, want in both])


#: One activation per function that the others are made of.
_TRIED: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def _attention(kernels: NativeKernels, random: Random) -> Pair:
    """In pages and heads that are read in place, and in such that are not."""
    found = [_attended(kernels, random, size) for size in ((12, 16, 2, 32), (60, 3, 2, 20))]
    return torch.cat([got.flatten() for got, _ in found]), torch.cat([want.flatten() for _, want in found])


def _attended(kernels: NativeKernels, random: Random, size: CacheSize) -> Pair:
    blocks, _, _, dim = size
    q, caches = random(8, 4, dim), make_caches(lambda shape: random(*shape), size)
    tables = torch.arange(blocks, dtype=torch.int32).view(2, -1).flip(0).contiguous()
    starts, contexts = torch.tensor([0, 1, 8], dtype=torch.int32), torch.tensor([90, 70], dtype=torch.int32)
    both = [
        attend(q, *caches, tables, starts, contexts, scale=0.2, window=40, softcap=30.0)
        for attend in (kernels.attention, reference.attention)
    ]
    return both[0], both[1]


def _write_kv(kernels: NativeKernels, random: Random) -> Pair:
    k, v, write = random(1, 2, 3, 5), random(1, 2, 3, 5), torch.tensor([5, 0, 2])
    got, want = make_caches(torch.zeros, (2, 4, 2, 5)), (torch.zeros(2, 4, 2, 5), torch.zeros(2, 4, 2, 5))
    kernels.write_kv(k, v, *got, write)
    reference.write_kv(k, v, *want, write)
    return torch.cat(got), torch.cat(want)


def _elementwise(kernels: NativeKernels, random: Random) -> Pair:
    x, up, weight, bias = random(3, 37), random(3, 37), random(37), random(37)
    got = [kernels.rms_norm(x, weight, 1e-5), kernels.layer_norm(x, weight, bias, 1e-5)]
    want = [reference.rms_norm(x, weight, 1e-5), reference.layer_norm(x, weight, bias, 1e-5)]
    got += [kernels.silu_mul(x, up), kernels.gelu_tanh_mul(x, up)]
    want += [reference.silu_mul(x, up), reference.gelu_tanh_mul(x, up)]
    return torch.cat(got), torch.cat(want)


def _peaks(kernels: NativeKernels, random: Random) -> Pair:
    x = random(5, 73) * 10
    return torch.cat(kernels.peaks(x)), torch.cat(reference.peaks(x))


def _rotary(kernels: NativeKernels, random: Random) -> Pair:
    q, k, cos, sin = random(1, 3, 4, 44), random(1, 3, 4, 44), random(1, 4, 40), random(1, 4, 40)
    both = [(q.clone(), k.clone()), (q, k)]
    kernels.rotary(both[0][0], both[0][1], cos, sin)
    reference.rotary(both[1][0], both[1][1], cos, sin)
    return torch.cat(both[0]), torch.cat(both[1])


_CHECKS: dict[str, Callable[[NativeKernels, Random], Pair]] = {
    "linear": _linear,
    "tiles": _tiles,
    "int8": _int8,
    "lora": _lora,
    "bottleneck": _bottleneck,
    "attention": _attention,
    "write_kv": _write_kv,
    "elementwise": _elementwise,
    "rotary": _rotary,
    "peaks": _peaks,
}
