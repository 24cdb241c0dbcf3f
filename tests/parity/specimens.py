"""Adapters written by the library that defines them, each beside that library's own model as the oracle."""

from __future__ import annotations

import copy
import json
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters_store.digest import Digest
from server.methods import METHODS
from server.methods.base import Adapter, BaseShape, Checkpoint, Limits
from server.methods.derive import derive
from server.methods.read import read_adapter
from server.recipes import Task
from tests.parity.configs import Config
from tests.parity.places import PLACES


@dataclass(frozen=True)
class Specimen:
    """An adapter as the server reads it, and the oracle's logits [T, V] for given ids."""

    name: str
    adapter: Adapter
    oracle: Callable[[list[int]], Tensor]

    @property
    def digest(self) -> Digest:
        return self.adapter.digest

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
        """The oracle's own tokens and the logits [count, V] they were picked from."""
        ids, rows = list(prompt), []
        for _ in range(count):
            rows.append(self.oracle(ids)[-1])
            ids.append(int(rows[-1].argmax()))
        return ids[len(prompt) :], torch.stack(rows)


def peft_specimen(
    name: str, config: Config, architecture: str, model: PreTrainedModel, base: BaseShape, directory: Path
) -> Specimen:
    """What PEFT saves for `config`; the oracle is what PEFT loads from that directory."""
    oracle = saved_and_loaded(config, architecture, model, directory)
    given = {} if config.task is None else {"task_ids": torch.tensor([config.task])}
    return Specimen(name, _of_task(_read(directory, base, name), config.task), _logits(oracle, **given))


def saved_and_loaded(config: Config, architecture: str, model: PreTrainedModel, directory: Path) -> nn.Module:
    """Trained (at random), saved into `directory`, and loaded from there, all by PEFT."""
    made = config.make(PLACES[architecture])
    made.task_type = peft.TaskType.CAUSAL_LM
    seed = zlib.crc32(directory.name.encode())
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = peft.get_peft_model(copy.deepcopy(model), made).eval()
        _randomise(trained, seed)
        trained.save_pretrained(directory)
        if config.dtype is not torch.float32:
            _cast(directory / "adapter_model.safetensors", config.dtype)
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()


def bitfit_specimen(model: PreTrainedModel, base: BaseShape, directory: Path) -> Specimen:
    """Biases on every second Linear, created where the base has none; the oracle is the base with those biases."""
    oracle = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    linear = [(n, m) for n, m in base.modules.items() if m.kind in ("linear", "conv1d") and "." in n and "lm_head" not in n]
    for name, shape in linear[::2]:
        bias = torch.randn(shape.out_features, generator=generator) * 0.3
        tensors[f"base_model.model.{name}.bias"] = bias
        module = oracle.get_submodule(name)
        module.bias = nn.Parameter(bias.clone(), requires_grad=False)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "BITFIT"}))
    return Specimen("bitfit", _read(directory, base, "bitfit"), _logits(oracle))


def bottleneck_specimen(model: PreTrainedModel, base: BaseShape, *, parallel: bool) -> Specimen:
    """Houlsby (both sublayers, sequential) or parallel adapters; the oracle applies the published formula by hooks.

    AdapterHub's own output is the oracle of tests/checkpoints; it cannot run every architecture here.
    """
    oracle = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(11 + parallel)
    residuals: dict[str, Tensor] = {}
    sites = {}
    for sublayer in base.sublayers:
        down, up = (torch.randn(*size, generator=generator) * 0.3 for size in ((6, 32), (32, 6)))
        down_bias, up_bias = (torch.randn(n, generator=generator) * 0.1 for n in (6, 32))
        sites[sublayer.exit] = {"down": down, "down_bias": down_bias, "up": up, "up_bias": up_bias}
        oracle.get_submodule(sublayer.residual).register_forward_pre_hook(
            lambda m, args, at=sublayer.residual: residuals.__setitem__(at, args[0])
        )

        def formula(
            m: nn.Module, args: object, y: Tensor, at: str = sublayer.residual, w: dict = sites[sublayer.exit]
        ) -> Tensor:
            x = residuals[at].view(y.shape) if parallel else y
            return y + torch.relu(x @ w["down"].T + w["down_bias"]) @ w["up"].T + w["up_bias"]

        oracle.get_submodule(sublayer.exit).register_forward_hook(formula)
    config = {"activation": "relu", "reads": "residual" if parallel else "output", "skip": 0}
    part = METHODS["bottleneck"].read(Checkpoint("bottleneck", config, sites), base, Limits())
    name = "bottleneck_parallel" if parallel else "bottleneck"
    return Specimen(name, Adapter(Digest.of(name.encode()), (part,)), _logits(oracle))


def base_logits(model: PreTrainedModel) -> Callable[[list[int]], Tensor]:
    return _logits(copy.deepcopy(model))


def _randomise(model: nn.Module, seed: int) -> None:
    """Adapters as if trained: everything PEFT trains is moved far enough for a wrong one to be noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def _cast(file: Path, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def _read(directory: Path, base: BaseShape, name: str) -> Adapter:
    return read_adapter({path.name: path for path in directory.iterdir()}, base, Limits(), Digest.of(name.encode()))


def _of_task(adapter: Adapter, task: int | None) -> Adapter:
    """What a request with this `task_id` is answered with, under the digest of the whole."""
    if task is None:
        return adapter
    return replace(derive(Task(adapter.digest, task), lambda source: adapter), digest=adapter.digest)


def _logits(model: nn.Module, **given: Tensor) -> Callable[[list[int]], Tensor]:
    @torch.inference_mode()
    def run(ids: list[int]) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits: Tensor = model(input_ids=torch.tensor([ids]), **given).logits[0]
        return logits

    return run
