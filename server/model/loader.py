"""Loader: one base model from a directory, frozen, guarded, and described as a `BaseShape`.

Weights are loaded once and never copied per tenant. Knows nothing of adapters and requests.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

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

_CHUNK = 1 << 24


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
    directory: Path, device: torch.device, dtype: torch.dtype, prepare: Callable[[nn.Module], None] | None = None
) -> Base:
    """Load a decoder from local safetensors and check that it can be served. `dtype` is the activations'.

    `prepare` may then swap modules for packed or fused ones of the same arithmetic.

    Raises: UnsupportedModelError when it is no decoder, lacks weights, or its attention is not understood.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto" if prepare else dtype,
            attn_implementation=NAME,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # a model class may raise anything when it meets an attention it has never heard of
        reason = str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
        raise UnsupportedModelError(f"{directory} is not a decoder that can be served: {reason[:300]}") from error
    model, report = cast("tuple[nn.Module, dict[str, set[str]]]", loaded)
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers and goes on
        raise UnsupportedModelError(f"{directory} lacks {len(missing)} of the model's tensors, {missing[0]} for one")
    nn.Module.to(model, device)
    return make_base(model, digest_of(directory), device, dtype, prepare)


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
    modules = dict(_module_shapes(model))
    with torch.inference_mode():
        if prepare is not None:
            prepare(model)
        attention = probe(model, text.num_hidden_layers)
    layout = sublayers(text.model_type, text.num_hidden_layers, text.to_dict())
    known = all({s.residual, s.inlet, s.exit} <= modules.keys() for s in layout)
    shape = BaseShape(
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
    )
    return Base(model, attention, shape, _eos_ids(model), device, dtype)


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
            yield name, ModuleShape("embedding", weight.shape[0], weight.shape[1])
        elif weight.ndim == 1:
            yield name, ModuleShape("norm", weight.shape[0], weight.shape[0], own)


def _eos_ids(model: nn.Module) -> frozenset[int]:
    """Every id that ends a text: the generation config's, else the config's."""
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
