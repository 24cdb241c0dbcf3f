"""Tiny random models, PEFT saves of them, and a harness that applies ops through hooks as the engine's sites do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters_store.digest import Digest
from server.methods import METHODS
from server.methods.base import BaseShape, Limits, ModuleShape, Op, Part
from server.methods.grouped import rows_of
from server.methods.read import read_parts
from server.model.kernels import Kernels, choose_kernels
from server.model.loader import weight_of
from server.model.scales import embedding_gain
from server.settings import default_home
from tests.tiny import ARCHITECTURES, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def models() -> dict[str, PreTrainedModel]:
    """One frozen random model per architecture."""
    torch.set_num_threads(1)
    return {name: tiny_model(name) for name in ARCHITECTURES}


def _module_shape(module: nn.Module) -> ModuleShape | None:
    bias = module.bias.detach().float() if isinstance(getattr(module, "bias", None), Tensor) else None
    match module:
        case nn.Linear():
            return ModuleShape("linear", module.in_features, module.out_features, bias)
        case Conv1D():
            return ModuleShape("conv1d", module.weight.shape[0], module.weight.shape[1], bias)
        case nn.Embedding():
            gain = embedding_gain(module, module.embedding_dim)
            return ModuleShape("embedding", module.num_embeddings, module.embedding_dim, gain=gain)
        case _ if "norm" in type(module).__name__.lower():
            return ModuleShape("norm", module.weight.shape[0], module.weight.shape[0], bias)
    return None


def shape_of(model: PreTrainedModel) -> BaseShape:
    config = model.config
    found = {name: _module_shape(module) for name, module in model.named_modules()}
    return BaseShape(
        digest=Digest("0" * 64),
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        modules={name: shape for name, shape in found.items() if shape is not None},
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        weight=partial(weight_of, model),
    )


@pytest.fixture
def base_of(models: dict[str, PreTrainedModel]) -> Callable[[str], BaseShape]:
    return lambda name: shape_of(models[name])


def _rows(x: Tensor) -> Tensor:
    """One row per token: features [n, d], or ids [n] where the module is an embedding."""
    return x.flatten(0, -2) if x.is_floating_point() else x.flatten()


class Hooked:
    """A model whose modules pass through ops; each sequence of a batch names its slot per pool."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.base = shape_of(model)
        self.ops: dict[str, dict[str, Op]] = {}  # module -> pool -> op
        self._slots: dict[str, list[int]] = {}  # pool -> slot of every token of the batch

    def put(self, part: Part, slot: int) -> None:
        for module, tensors in part.sites.items():
            op = self._op(part, module)
            op.grow(slot + 1)
            op.put(slot, tensors)

    def _op(self, part: Part, module: str) -> Op:
        pools = self.ops.setdefault(module, {})
        if not pools:
            target = self.model.get_submodule(module)
            target.register_forward_pre_hook(lambda _, args, at=module: (self._before(at, args[0]),))
            target.register_forward_hook(lambda _, args, y, at=module: self._after(at, args[0], y))
        if part.pool not in pools:
            pools[part.pool] = METHODS[part.method].op(part, module, self.base, CPU, torch.float32)
        return pools[part.pool]

    def _before(self, module: str, x: Tensor) -> Tensor:
        flat = _rows(x)
        for pool, op in self.ops[module].items():
            if op.acts_before and pool in self._slots:
                flat = op.before(flat, rows_of(self._slots[pool]))
        return flat.view_as(x)

    def _after(self, module: str, x: Tensor, y: Tensor) -> Tensor:
        flat = y.flatten(0, -2)
        for pool, op in sorted(self.ops[module].items(), key=lambda item: item[1].order):
            if pool in self._slots:
                flat = op.after(_rows(x), flat, rows_of(self._slots[pool]))
        return flat.view_as(y)

    @torch.no_grad()
    def logits(self, ids: Tensor, slots: Mapping[str, Sequence[int]]) -> Tensor:
        """ids [B, T], slots: pool -> slot of each of the B sequences. [B, T, vocab]."""
        self._slots = {pool: [slot for slot in of_rows for _ in range(ids.shape[1])] for pool, of_rows in slots.items()}
        return self.model(ids, use_cache=False).logits


@pytest.fixture
def hooked(models: dict[str, PreTrainedModel]) -> Callable[[str], Hooked]:
    return lambda name: Hooked(copy.deepcopy(models[name]))


class Trained:
    """One PEFT adapter on a tiny model, randomised as if trained, saved to disk; the model is the oracle."""

    def __init__(self, model: PreTrainedModel, config: object, folder: Path) -> None:
        from peft import get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(5)
            self.oracle = get_peft_model(copy.deepcopy(model), config)
            for name, parameter in self.oracle.named_parameters():
                if parameter.requires_grad:
                    centre = 1.0 if "ia3" in name else 0.0
                    parameter.data.normal_(mean=centre, std=0.2)
            self.oracle.eval().save_pretrained(folder)
        self.paths = {path.name: path for path in folder.iterdir()}
        self.base = shape_of(model)

    def parts(self, limits: Limits | None = None) -> tuple[Part, ...]:
        return read_parts(self.paths, self.base, limits or Limits())

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.oracle(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture
def trained(models: dict[str, PreTrainedModel], tmp_path: Path) -> Callable[..., Trained]:
    """trained(model name, PEFT config) -> the saved adapter. Every call gets its own folder."""
    count = iter(range(1000))
    return lambda name, config: Trained(models[name], config, tmp_path / str(next(count)))


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """What a lab computes with."""
    torch.set_num_threads(1)
    if request.param == "torch":
        return Kernels("torch")
    chosen = choose_kernels(CPU, torch.float32, True, default_home(), lambda line: None)
    if chosen.name != "native":
        pytest.skip(chosen.name)
    return chosen


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(1, 31).view(3, 10)
