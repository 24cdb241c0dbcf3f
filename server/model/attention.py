"""Attention over the paged KV cache, behind transformers' public attention interface.

Owns the cache tensors and the guard that refuses a model whose attention is not understood. Knows no requests: what to
read and write comes from `Step`.

    layer's cache   keys, values  [blocks, block_size, kv_heads, head_dim], in memory as the kernels like it (`MakeCaches`)
    step.write      where this step's K/V go;  step.tables  where each row's context lies
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import AdapterdError
from .native import CacheSize
from .step import Step

NAME = "adapterd"
_SLOT = "_adapterd_attention"  # attribute of an attention module that holds its LayerAttention

#: Keyword arguments of transformers' attention calls that change nothing here: what is visible comes from the step.
_IGNORED = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "dropout",
        "is_causal",
        "layer_type",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "return_tensors",
        "scaling",
        "use_cache",
    }
)


class UnsupportedModelError(AdapterdError):
    """The base model cannot be served correctly; the message says what it needs."""


class PagedAttention(Protocol):
    """A kernel for a whole step: q [T, Hq, D] against the caches -> [T, Hq, D]."""

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, window: int, softcap: float
    ) -> Tensor: ...


class WriteKV(Protocol):
    """Scatters k and v [1, Hkv, T, D] into rows `write` [T] of the caches [blocks, block_size, Hkv, D]."""

    def __call__(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, write: Tensor) -> None: ...


#: Makes one layer's keys and values, logically of the size given, in the order of memory that its kernels read, from
#: whatever makes a zero tensor.
MakeCaches = Callable[[Callable[[tuple[int, ...]], Tensor], CacheSize], tuple[Tensor, Tensor]]


@dataclass
class LayerAttention:
    """One layer's cache and how to attend over it. Invariant: block 0 stays zero."""

    keys: Tensor  # [blocks, block_size, kv_heads, head_dim]
    values: Tensor
    step: Step
    kernel: PagedAttention
    write: WriteKV

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0, softcap: float = 0.0) -> Tensor:
        """q [1, Hq, T, D], k and v [1, Hkv, T, D] (keys after RoPE) -> [1, T, Hq, D]."""
        self.write(k, v, self.keys, self.values, self.step.write)
        return self.kernel(q[0].transpose(0, 1), self.keys, self.values, self.step, scale, window, softcap)[None]


def torch_caches(zeros: Callable[[tuple[int, ...]], Tensor], size: CacheSize) -> tuple[Tensor, Tensor]:
    """The pure-torch `MakeCaches`: contiguous."""
    return zeros(size), zeros(size)


def torch_write(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, write: Tensor) -> None:
    """The pure-torch `WriteKV`."""
    for cache, new in ((keys, k), (values, v)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, write, new[0].transpose(0, 1).to(cache.dtype))


def torch_attention(q: Tensor, keys: Tensor, values: Tensor, step: Step, scale: float, window: int, softcap: float) -> Tensor:
    """The pure-torch kernel: one batched product for the rows that decode, one product per row that prefills."""
    out = torch.empty_like(q)
    if step.decodes:
        n = step.decodes
        out[:n] = _decode(q[:n], keys, values, step.tables[:n], step.contexts[:n], scale, window, softcap)
    for row in range(step.decodes, len(step.spans)):
        start, stop, context = step.spans[row]
        blocks = step.tables[row, : -(-context // keys.shape[1])].long()
        k = keys[blocks].flatten(0, 1)[:context]  # [C, Hkv, D]
        v = values[blocks].flatten(0, 1)[:context]
        out[start:stop] = _prefill(q[start:stop], k, v, scale, window, softcap)
    return out


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, scale: float, window: int, softcap: float
) -> Tensor:
    """q [R, Hq, D], one query per row at its context's last position -> [R, Hq, D]. Padding reads the zero block."""
    rows, heads, dim = q.shape
    kv_heads, size = keys.shape[2], keys.shape[1]
    blocks = tables[:, : -(-int(contexts.max()) // size)].long()
    k = keys[blocks].flatten(1, 2).transpose(1, 2)  # [R, Hkv, C, D]
    v = values[blocks].flatten(1, 2).transpose(1, 2)
    position = torch.arange(k.shape[2], device=q.device)
    hidden = position >= contexts[:, None]  # [R, C]
    if window:
        hidden = hidden | (position < contexts[:, None] - window)
    scores = _cap((q.view(rows, kv_heads, heads // kv_heads, dim) @ k.transpose(2, 3)) * scale, softcap)
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    # A block's unwritten tail may hold another request's numbers: its weight is 0, and 0 * NaN must not happen.
    v = v.masked_fill(hidden[:, None, :, None], 0)
    return (weights @ v).view(rows, heads, dim)


def _prefill(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """q [n, Hq, D] at the last n of C positions, k and v [C, Hkv, D] -> [n, Hq, D], causal."""
    count, context = q.shape[0], k.shape[0]
    query = torch.arange(context - count, context, device=q.device)[:, None]
    position = torch.arange(context, device=q.device)[None, :]
    seen = position <= query
    if window:
        seen = seen & (position > query - window)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    if not softcap:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    else:
        groups = q.shape[1] // k.shape[1]
        scores = _cap((q @ k.repeat_interleave(groups, 1).transpose(2, 3)) * scale, softcap)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
        mixed = weights @ v.repeat_interleave(groups, 1)
    return mixed[0].transpose(0, 1)


def _cap(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls for `attn_implementation="adapterd"`; the module carries its own layer's state."""
    handler: Callable[..., Tensor] | None = getattr(module, _SLOT, None)
    if handler is None:
        raise UnsupportedModelError(f"{type(module).__name__} calls attention before the engine has bound it")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    window, softcap = kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0
    if isinstance(handler, LayerAttention):
        return handler(query, key, value, scale, window, softcap), None
    return handler(module, query, key, value, {**kwargs, "attention_mask": attention_mask}), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _dispatch)


@dataclass(frozen=True)
class AttentionShape:
    """What the dry run saw: the attention modules in layer order, and the shape of their keys."""

    modules: tuple[nn.Module, ...]
    kv_heads: int
    head_dim: int
    windowed: bool = False  # some layer sees a sliding window only


@dataclass(frozen=True)
class _Call:
    """One call of the dry run."""

    module: nn.Module
    kv: tuple[int, int]  # heads, head_dim
    windowed: bool


def probe(model: nn.Module, num_layers: int) -> AttentionShape:
    """Dry runs of one and two tokens: every layer asks for attention exactly once, in a way that is implemented, and
    tokens meet nowhere else.

    Raises: UnsupportedModelError naming what is not: a layer that never calls, an unknown keyword, uneven KV shapes.
    """
    calls: list[_Call] = []

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        _check_call(module, q, k, v, kwargs)
        calls.append(_Call(module, (k.shape[1], k.shape[3]), bool(kwargs.get("sliding_window"))))
        return torch.zeros_like(q).transpose(1, 2)

    with recording(model, record):
        _dry_run(model, [0])
        found = tuple(calls)
        _check_layers(model, found, num_layers)
        if not next(model.parameters()).is_meta:  # without values there is nothing to compare
            _check_mixing(model)
    kv_heads, head_dim = found[0].kv
    return AttentionShape(tuple(call.module for call in found), kv_heads, head_dim, any(call.windowed for call in found))


@contextmanager
def recording(model: nn.Module, handler: Callable[..., Tensor]) -> Iterator[None]:
    """Whatever asks for attention in `model` is answered by handler(module, q, k, v, keyword arguments)."""
    with bound(dict.fromkeys(model.modules(), handler)):
        yield


@contextmanager
def bound(handlers: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Each module's attention, for a while."""
    for module, handler in handlers.items():
        setattr(module, _SLOT, handler)
    try:
        yield
    finally:
        for module in handlers:
            delattr(module, _SLOT)


def attention_of(module: nn.Module) -> LayerAttention | None:
    """The module's own layer of the cache; None while something else answers for it, as in a dry run."""
    handler = getattr(module, _SLOT, None)
    return handler if isinstance(handler, LayerAttention) else None


@torch.inference_mode()
def _dry_run(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Logits [V] of the last of some tokens that all stand at position 0."""
    device = next(model.parameters()).device
    tokens = torch.tensor([ids], device=device)
    last = torch.tensor([len(ids) - 1], device=device)
    try:
        out = model(input_ids=tokens, position_ids=torch.zeros_like(tokens), use_cache=False, logits_to_keep=last)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UnsupportedModelError(f"{_name(model)} does not run with a custom attention: {error!r}") from error
    logits: Tensor = out.logits[0, -1]
    return logits


def _check_layers(model: nn.Module, calls: Sequence[_Call], num_layers: int) -> None:
    if len(calls) != num_layers or len({id(call.module) for call in calls}) != num_layers:
        raise UnsupportedModelError(
            f"{_name(model)} asked for attention {len(calls)} times in {num_layers} layers; it cannot be served"
        )
    shapes = {call.kv for call in calls}
    if len(shapes) != 1:
        raise UnsupportedModelError(f"{_name(model)} has layers of different KV shapes {sorted(shapes)}")
    config = cast("PretrainedConfig", model.config).get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # one kind for all
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * num_layers
    for call, kind in zip(calls, kinds, strict=True):
        # A mask is never built, so a window that the call does not name would silently be none.
        if kind not in ("full_attention", "sliding_attention") or call.windowed != (kind == "sliding_attention"):
            raise UnsupportedModelError(f"{_name(model)} has layers of {kind}, which is not implemented")


def _check_mixing(model: nn.Module) -> None:
    """With attention silenced, a token must not notice its neighbour: in a step that is another user's."""
    one, other = _dry_run(model, [0, 2]), _dry_run(model, [1, 2])
    # Not bit for bit: a mixture of experts multiplies other shapes when the neighbour takes another expert.
    if not torch.allclose(one, other, rtol=0, atol=1e-2 * max(float(one.abs().max()), 1e-6)):
        raise UnsupportedModelError(
            f"{_name(model)} mixes tokens outside attention (by recurrence or convolution); requests cannot share a step"
        )


def bind(shape: AttentionShape, layers: list[LayerAttention]) -> None:
    """Attach each layer's cache to its module."""
    for module, layer in zip(shape.modules, layers, strict=True):
        setattr(module, _SLOT, layer)


def _check_call(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, kwargs: Mapping[str, Any]) -> None:
    name = type(module).__name__
    known = _IGNORED | {"sliding_window", "softcap"}
    unknown = sorted(key for key, value in kwargs.items() if key not in known and value is not None)
    if unknown:
        raise UnsupportedModelError(f"{name} passes {', '.join(unknown)} to attention, which is not implemented")
    if k.shape != v.shape or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise UnsupportedModelError(
            f"{name} has query, key, value shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; not implemented"
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UnsupportedModelError(f"{name} is not causal")


def _name(model: nn.Module) -> str:
    return type(model).__name__
