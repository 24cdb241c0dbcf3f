"""Loader: one base model from a directory, frozen, guarded, and described as a `BaseShape`.

Weights are loaded once and never copied per tenant. Knows nothing of adapters and requests.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from adapters_store.digest import Digest

from ..methods.base import BaseShape, ModuleShape
from ..methods.layout import sublayers
from .attention import NAME, AttentionShape, UnsupportedModelError, probe
from .linear import PackedModule
from .quantized import QuantizedModule
from .scales import embedding_gain, norm_offset

_CHUNK = 1 << 24
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """The resident base model and everything the rest of the server knows of it."""

    model: nn.Module
    attention: AttentionShape
    shape: BaseShape
    eos: frozenset[int]
    device: torch.device
    dtype: torch.dtype  # of activations

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they are held."""
        held = {t.data_ptr(): t.nbytes for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(held.values()) + sum(m.nbytes for m in self.model.modules() if isinstance(m, PackedModule))


def load_base(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Callable[[nn.Module], None] | None = None,
    int8: bool = False,
) -> Base:
    """Load a decoder from local safetensors and check that it can be served. `dtype` is the activations'.

    `prepare` may then swap modules for packed or fused ones of the same arithmetic, or (`int8`) for rounded ones: another
    base, whose digest differs.

    Raises: UnsupportedModelError when it is no decoder, lacks weights, or its attention is not understood.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with _without_report():
            loaded = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype="auto" if prepare else dtype,
                attn_implementation=NAME,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_complete` refuses them, and by name
            )
    except Exception as error:  # a model class may raise anything when it meets an attention it has never heard of
        raise UnsupportedModelError(f"{directory} is not a decoder that can be served: {_reason(error)}") from error
    model, report = cast("tuple[nn.Module, dict[str, set[Any]]]", loaded)
    _check_complete(directory, report)
    nn.Module.to(model, device)
    digest = digest_of(directory)
    return make_base(model, rounded(digest) if int8 else digest, device, dtype, prepare)


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers prints a coloured table of what did not fit; `_check_complete` says the same in one line."""
    loud = logging.getLogger("transformers")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        yield
    finally:
        loud.setLevel(level)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args == (NAME,):  # looked up in the class's own table of attentions
        return "its model class does not support a custom attention"
    return (str(error) if isinstance(error, (ValueError, OSError)) else repr(error))[:300]


def _check_complete(directory: Path, report: Mapping[str, Collection[Any]]) -> None:
    """Every tensor of the model was in the checkpoint: where not, transformers fills in random numbers and goes on.

    Raises: UnsupportedModelError naming a tensor that is missing or has another shape.
    """
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModelError(f"{directory} lacks {len(missing)} of the model's tensors, {missing[0]} for one")
    for name, stored, needed in sorted(report["mismatched_keys"]):
        raise UnsupportedModelError(f"{directory} holds {name} in shape {list(stored)}, the model needs {list(needed)}")
    if unused := sorted(report["unexpected_keys"]):
        _log.warning("%s: %d tensors are none of the model's, %s for one", directory.name, len(unused), unused[0])


def make_base(
    model: nn.Module,
    digest: Digest,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Callable[[nn.Module], None] | None = None,
) -> Base:
    """Freeze, guard and describe a Hugging Face causal language model that is already in memory."""
    model = model.eval().requires_grad_(False)
    config = cast("PretrainedConfig", model.config)
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; adapterd serves decoders")
    config._attn_implementation = NAME
    modules = module_shapes(model)
    with torch.inference_mode():
        if prepare is not None:
            prepare(model)
        attention = probe(model, text.num_hidden_layers)
    shape = shape_of(model, digest, modules, attention, partial(weight_of, model))
    return Base(model, attention, shape, _eos_ids(model), device, dtype)


def shape_of(
    model: nn.Module,
    digest: Digest,
    modules: Mapping[str, ModuleShape],
    attention: AttentionShape,
    weight: Callable[[str], Tensor],
) -> BaseShape:
    """The model as an adapter sees it: what its config says, its modules, and the shape of its keys."""
    text = cast("PretrainedConfig", model.config).get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    layout = sublayers(text.model_type, text.num_hidden_layers, text.to_dict())
    known = all({s.residual, s.inlet, s.exit} <= modules.keys() for s in layout)
    return BaseShape(
        digest=digest,
        model_type=text.model_type,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        vocab_size=text.vocab_size,
        max_positions=int(getattr(text, "max_position_embeddings", 0) or 2048),
        modules=modules,
        sublayers=layout if known else (),
        tied_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        window=int(text.sliding_window) if attention.windowed else 0,
        head=_name_of(model, head),
        embedding=_name_of(model, embedding),
        weight=weight,
    )


def digest_of(directory: Path) -> Digest:
    """sha256 over the config and every weight file, in name order."""
    total = hashlib.sha256()
    for path in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        file_hash = hashlib.sha256()
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while chunk := file.read(_CHUNK):
                file_hash.update(chunk)
        total.update(f"{path.name}\0{file_hash.hexdigest()}\n".encode())
    return Digest(total.hexdigest())


def rounded(digest: Digest) -> Digest:
    """The digest of a base whose linear layers are held in int8: its keys and values are not those of the base itself."""
    return Digest.of(f"{digest} int8 per output channel".encode())


def weight_of(model: nn.Module, name: str) -> Tensor:
    """A module's weight as an fp32 copy on the CPU, [out, in] also where the base stores its transpose or packed panels.

    What the base multiplies with: of a linear layer in int8, the rounded weight.

    Raises: AttributeError when there is no such module or it has no weight.
    """
    module = model.get_submodule(name)
    if isinstance(module, PackedModule):
        return module.packed.unpack().to(torch.float32, copy=True)
    if isinstance(module, QuantizedModule):
        return module.unpack().cpu()
    weight = cast("Tensor", module.weight).detach()
    if isinstance(module, Conv1D):
        weight = weight.T
    return weight.to("cpu", torch.float32, copy=True).contiguous()


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def module_shapes(model: nn.Module) -> dict[str, ModuleShape]:
    """Every Linear, Conv1D, Embedding and norm, by its dotted name."""
    return dict(_module_shapes(model))


def _module_shapes(model: nn.Module) -> Iterator[tuple[str, ModuleShape]]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        bias = getattr(module, "bias", None)
        own = bias.detach().float().cpu() if isinstance(bias, Tensor) else None
        if isinstance(module, nn.Linear):
            yield name, ModuleShape("linear", module.in_features, module.out_features, own)
        elif isinstance(module, Conv1D):
            yield name, ModuleShape("conv1d", weight.shape[0], weight.shape[1], own)
        elif isinstance(module, nn.Embedding):
            gain = embedding_gain(module, weight.shape[1])
            yield name, ModuleShape("embedding", weight.shape[0], weight.shape[1], gain=gain)
        elif weight.ndim == 1:
            offset = norm_offset(module, weight.shape[0])
            yield name, ModuleShape("norm", weight.shape[0], weight.shape[0], own, offset=offset)


def _eos_ids(model: nn.Module) -> frozenset[int]:
    """Every id that ends a text: the generation config's, else the config's."""
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
