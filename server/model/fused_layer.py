"""Attention modules and decoder layers with a slim forward: the same modules, called with nothing in between.

Transformers' own forward spends more time on views, rotary embedding and keyword arguments than a small step's kernels take.
A module is recognised by its attributes, tried on the tensors the model itself gives it, and left as it is where anything
differs. Every projection and norm is still called as a module, so hooks (adapters) run. Knows no adapters.

    model:      embeddings -> all layers in one native call -> norm
    layer:      h + attention(norm(h))    then    h + mlp(norm(h))
    attention:  q, k, v projections -> one native call (rotary, cache, attention) -> output projection
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from .attention import LayerAttention, attention_of, bound, recording, torch_attention, torch_write
from .native import NativeKernels
from .program import AttentionShape, Frame, LayerProgram, Space, layer_parts
from .step import Step

#: Tokens of the trial: a row of its own each, at different positions.
_TRIAL = 5


@dataclass(frozen=True)
class _Call:
    """What one module was given in the trial, and what it gave: a tensor, or a tuple that begins with one."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


def fuse_layers(model: nn.Module, native: NativeKernels) -> int:
    """Give attention modules and decoder layers a slim forward; returns how many modules got one."""
    seen = _attentions(model)
    if seen is None:
        return 0
    fused, space, frame = 0, Space(), Frame()
    programs: list[tuple[LayerProgram, _Call]] = []
    with _trial(seen):
        calls = _calls(model, seen)
        for module, attention in seen.items():
            fused += _replace(module, _attention_forward(module, attention, native), calls.get(module))
        for module, call in calls.items():
            if _replace(module, _layer_forward(module), call):
                fused += 1
                program = _program(module, seen, native, space, frame)
                if program is not None and _replace(module, _programmed(module, program), _copied(call)):
                    program.tile()
                    programs.append((program, call))
        for (program, call), (following, next_call) in pairwise(programs):
            if _follows(call, next_call):
                program.following = following
        fused += _fuse_stack(model, [program for program, _ in programs])
    return fused


def _follows(call: _Call, following: _Call) -> bool:
    """Whether nothing came between two layers of the trial: the one's output was the other's input, with the same rotation."""
    turns = (each.kwargs.get("position_embeddings") for each in (call, following))
    return bool(following.args) and following.args[0] is _first(call.output) and next(turns) is next(turns)


def _replace(module: nn.Module, forward: Callable[..., Any] | None, call: _Call | None) -> bool:
    if forward is None or call is None:
        return False
    try:
        got = forward(*call.args, **call.kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    if type(got) is not type(call.output) or not _agree(_first(got), _first(call.output)):
        return False
    module.forward = forward
    return True


def _copied(call: _Call) -> _Call:
    """The same call on tensors of its own: a program writes over its input."""
    return _Call(tuple(a.clone() if isinstance(a, Tensor) else a for a in call.args), call.kwargs, call.output)


def _agree(got: Tensor, expected: Tensor) -> bool:
    allowed = 1e-4 * expected.abs() + 1e-5 * expected.abs().max()
    return got.shape == expected.shape and bool(((got - expected).abs() <= allowed).all())


# -- the trial -------------------------------------------------------------------------------------------------------


def _fuse_stack(model: nn.Module, programs: Sequence[LayerProgram]) -> bool:
    """Give the model around the layers a slim forward, if they are one chain and it does nothing else that matters."""
    inner = cast("nn.Module", getattr(model, "base_model", None))
    names = ("embed_tokens", "rotary_emb", "norm", "layers")
    if not programs or not all(isinstance(getattr(inner, name, None), nn.Module) for name in names):
        return False
    if len(programs) != len(cast("nn.ModuleList", inner.layers)) or any(program.following is None for program in programs[:-1]):
        return False
    calls: list[_Call] = []
    handle = inner.register_forward_hook(lambda _, args, kwargs, out: calls.append(_Call(args, kwargs, out)), with_kwargs=True)
    try:
        _run(model)
    finally:
        handle.remove()
    (call,) = calls
    forward = _stack_forward(inner, programs[0], len(programs), type(call.output))
    try:
        got = forward(*call.args, **call.kwargs)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    if not _agree(got.last_hidden_state, call.output.last_hidden_state):
        return False
    inner.forward = forward
    return True


def _stack_forward(inner: nn.Module, first: LayerProgram, layers: int, output: type[Any]) -> Callable[..., Any]:
    """embeddings -> all layers in one native call -> norm; as modules where that cannot be, or where more is asked for."""
    modules = inner.forward
    embed, rotary, norm = (cast("nn.Module", getattr(inner, name)) for name in ("embed_tokens", "rotary_emb", "norm"))
    last = cast("nn.ModuleList", inner.layers)[-1]

    def forward(input_ids: Any = None, *, inputs_embeds: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        given = inputs_embeds
        plain = all(value is None or value is False for value in kwargs.values())
        if plain and position_ids is not None and not last._forward_hooks:
            given = embed(input_ids) if given is None else given
            if first.run_through(given, rotary(given, position_ids=position_ids), layers):
                return output(last_hidden_state=norm(given))
        ids = {"input_ids": input_ids} if given is None else {"inputs_embeds": given}
        return modules(**ids, position_ids=position_ids, **kwargs)

    return forward


def _attentions(model: nn.Module) -> dict[nn.Module, AttentionShape] | None:
    """The attention modules of one pass, None where the model does not run or one is called twice."""
    seen: dict[nn.Module, AttentionShape] = {}
    twice = False

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        nonlocal twice
        twice |= module in seen
        scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
        window, softcap = kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0
        seen[module] = AttentionShape(q.shape[1], k.shape[1], k.shape[3], scale, window, softcap)
        return torch.zeros_like(q).transpose(1, 2)

    with recording(model, record):
        try:
            _run(model)
        except Exception:  # whatever is wrong with this model, the guard that follows says it
            return None
    return None if twice else seen


@contextmanager
def _trial(seen: Mapping[nn.Module, AttentionShape]) -> Iterator[None]:
    """Every attention module over a small cache of its own, in blocks of one: token i in block i + 1, seeing 1..i + 1."""
    last = torch.arange(1, _TRIAL + 1, dtype=torch.int32)
    step = Step(
        write=last.long(),
        tables=torch.where(last <= last[:, None], last, 0).int().contiguous(),
        starts=torch.arange(_TRIAL + 1, dtype=torch.int32),
        contexts=last,
        spans=tuple((i, i + 1, i + 1) for i in range(_TRIAL)),
        decodes=_TRIAL,
    )
    caches = {module: torch.zeros(2, _TRIAL + 1, 1, at.kv_heads, at.dim) for module, at in seen.items()}
    with bound({module: LayerAttention(kv[0], kv[1], step, torch_attention, torch_write) for module, kv in caches.items()}):
        yield


def _run(model: nn.Module) -> None:
    device = next(model.parameters()).device
    ids = torch.arange(1, _TRIAL + 1, device=device)[None]
    model(input_ids=ids, position_ids=ids * 3, use_cache=False, logits_to_keep=torch.tensor([0], device=device))


def _calls(model: nn.Module, seen: Mapping[nn.Module, AttentionShape]) -> dict[nn.Module, _Call]:
    """What attention modules and the modules around them were given and gave, in one pass over the trial's cache."""
    calls: dict[nn.Module, _Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module] = _Call(args, kwargs, output)

    around = [module for module in model.modules() if any(child in seen for child in module.children())]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in (*seen, *around)]
    try:
        _run(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first(output: Any) -> Tensor:
    return cast("Tensor", output[0] if isinstance(output, tuple) else output)


# -- the slim forwards -----------------------------------------------------------------------------------------------


def _attention_forward(module: nn.Module, at: AttentionShape, native: NativeKernels) -> Callable[..., Any] | None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return None
    q_proj, k_proj, v_proj, o_proj = (getattr(module, name) for name in names)
    original = module.forward

    def forward(hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        layer = attention_of(module)
        if layer is None:  # a dry run, which wants to see what the model asks for
            return original(hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs)
        step = layer.step
        mixed = native.attend(
            q_proj(hidden_states), k_proj(hidden_states), v_proj(hidden_states), position_embeddings, layer.keys,
            layer.values, step.write, step.tables, step.starts, step.contexts, scale=at.scale, window=at.window,
            softcap=at.softcap,
        )  # fmt: skip
        return o_proj(mixed), None

    return forward


def _layer_forward(module: nn.Module) -> Callable[..., Any] | None:
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return None
    norm, attention, second_norm, mlp = (getattr(module, name) for name in names)

    def forward(hidden_states: Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        mixed, _ = attention(hidden_states=norm(hidden_states), position_embeddings=position_embeddings, **kwargs)
        mixed += hidden_states
        out = mlp(second_norm(mixed))
        out += mixed
        return out

    return forward


def _program(
    module: nn.Module, seen: Mapping[nn.Module, AttentionShape], native: NativeKernels, space: Space, frame: Frame
) -> LayerProgram | None:
    shape = seen.get(cast("nn.Module", module.self_attn))
    parts = None if shape is None else layer_parts(module, shape)
    return None if parts is None else LayerProgram(module, parts, native, space, frame)


def _programmed(module: nn.Module, program: LayerProgram) -> Callable[..., Any]:
    """A layer's forward as one native call, in place on the hidden states; as modules where its program cannot be used."""
    modules = module.forward

    def forward(hidden_states: Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        if program.run(hidden_states, position_embeddings):
            return hidden_states
        return modules(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)

    return forward
