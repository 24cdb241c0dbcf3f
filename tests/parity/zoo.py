"""One adapter per family, written by the library that defines it, beside that library's own model as the oracle."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters_store.digest import Digest
from server.methods import METHODS
from server.methods.base import Adapter, BaseShape, Checkpoint, Limits
from server.methods.read import read_adapter


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


#: At least two of these exist in every architecture.
SOME_MODULES = ["q_proj", "down_proj", "c_attn", "c_proj", "fc2", "query_key_value", "dense_4h_to_h"]

PEFT_CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "lora_last_layer": lambda: peft.LoraConfig(
        r=12, lora_alpha=6, target_modules=SOME_MODULES, layers_to_transform=[1], use_rslora=True
    ),
    "lora_wide": lambda: peft.LoraConfig(r=24, lora_alpha=24, target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5),
    "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=6),
    "p_tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16),
}


def peft_specimen(name: str, model: PreTrainedModel, base: BaseShape, directory: Path) -> Specimen:
    config = PEFT_CONFIGS[name]()
    config.task_type = peft.TaskType.CAUSAL_LM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.get_peft_model(copy.deepcopy(model), config).eval()
        _randomise(oracle, seed=len(name))
        oracle.save_pretrained(directory)
    return Specimen(name, _read(directory, base, name), _logits(oracle))


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


def base_specimen(model: PreTrainedModel) -> Callable[[list[int]], Tensor]:
    return _logits(copy.deepcopy(model))


def _randomise(model: nn.Module, seed: int) -> None:
    """Adapters as if trained: far enough from the identity that a wrong one is noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "prompt_encoder" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "ia3_" in name:
                parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) * 0.3)


def _read(directory: Path, base: BaseShape, name: str) -> Adapter:
    return read_adapter({path.name: path for path in directory.iterdir()}, base, Limits(), Digest.of(name.encode()))


def _logits(model: nn.Module) -> Callable[[list[int]], Tensor]:
    @torch.inference_mode()
    def run(ids: list[int]) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
        return logits

    return run
