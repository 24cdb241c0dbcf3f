"""Writes tests/golden/adapterhub: tiny random bases, adapters saved by AdapterHub's own library, and what it computes.

    <venv>/bin/python tests/golden/make_adapterhub.py        (README.md beside this file says how to make the venv)

Imports nothing of the server. Running it twice on one machine writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import adapters
import torch
from adapters import BnConfig, ConfigUnion, DoubleSeqBnConfig, IA3Config, LoRAConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parent / "adapterhub"
NAME = "golden"
NEW_TOKENS = 6

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
_GQA = {**_WIDE, "num_key_value_heads": 2, "tie_word_embeddings": False}

#: Name -> arguments of its Hugging Face config; the tests build the same models from them.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"model_type": "llama", **_GQA},
    "mistral": {"model_type": "mistral", **_GQA, "sliding_window": None},
    "gpt2": {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen2": {"model_type": "qwen2", **_GQA},
    "qwen3": {"model_type": "qwen3", **_GQA, "head_dim": 8},
    "phi": {"model_type": "phi", **_WIDE, "tie_word_embeddings": False},
}
#: Every activation that has no parameters of its own.
ACTIVATIONS = [
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh"),
    *("laplace", "leaky_relu", "leakyrelu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6"),
    *("sigmoid", "silu", "swish", "tanh"),
]


def cases() -> Iterator[tuple[str, str, Any]]:
    """(model, case, config)."""
    lora = {"selfattn_lora": True, "intermediate_lora": True, "output_lora": True, "r": 3, "alpha": 6}
    for model in MODELS:
        yield model, "seq_bn", SeqBnConfig(reduction_factor=8)
        yield model, "double_seq_bn", DoubleSeqBnConfig(reduction_factor=8)
        if model != "phi":  # the library has no input for a parallel adapter after phi's feed-forward, and crashes
            yield model, "par_bn", ParBnConfig(reduction_factor=8)
        yield model, "lora", LoRAConfig(**lora, attn_matrices=["q", "v"])
        yield model, "ia3", IA3Config()
    yield "phi", "parallel_attention", BnConfig(True, False, 8, "tanh", is_parallel=True)
    yield "gpt2", "lora_k", LoRAConfig(r=2, alpha=5, attn_matrices=["k"])
    yield "gpt2", "ia3_alpha", IA3Config(alpha=2, attn_matrices=["q", "v"])
    yield from (("llama", case, config) for case, config in _variants())


def _variants() -> Iterator[tuple[str, Any]]:
    for before in (False, True):
        for after in (False, True):
            for residual in (False, True):
                options = {"original_ln_before": before, "original_ln_after": after, "residual_before_ln": residual}
                case = f"seq_before{before:d}_after{after:d}_residual{residual:d}"
                yield case, BnConfig(True, True, 8, "tanh", **options)
    yield "parallel_without_residual", ParBnConfig(reduction_factor=8, original_ln_after=False)
    yield "parallel_both", BnConfig(True, True, 8, "gelu", is_parallel=True, scaling="channel")
    for activation in ACTIVATIONS:
        yield f"act_{activation}", SeqBnConfig(reduction_factor=16, non_linearity=activation)
    yield "scaling_constant", SeqBnConfig(reduction_factor=8, scaling=0.5)
    yield "scaling_learned", SeqBnConfig(reduction_factor=8, scaling="learned")
    yield "scaling_channel", SeqBnConfig(reduction_factor=8, scaling="channel")
    yield "norm_before", DoubleSeqBnConfig(reduction_factor=8, ln_before=True)
    yield "norm_after", DoubleSeqBnConfig(reduction_factor=8, ln_after=True)
    yield "norms_parallel", ParBnConfig(reduction_factor=8, ln_before=True, ln_after=True, adapter_residual_before_ln=True)
    yield "norms_scaled", SeqBnConfig(reduction_factor=8, ln_before=True, ln_after=True, scaling=2.0)
    yield "residual_flag_without_norm", SeqBnConfig(reduction_factor=8, adapter_residual_before_ln=True)
    yield "widths", DoubleSeqBnConfig(reduction_factor={"0": 16, "default": 2})
    yield "wider_than_hidden", SeqBnConfig(reduction_factor=0.8)
    yield "width_one", SeqBnConfig(reduction_factor=64)
    yield "leave_out", DoubleSeqBnConfig(reduction_factor=8, leave_out=[0])
    yield "lora_leave_out", LoRAConfig(r=2, alpha=2, attn_matrices=["q", "k", "v"], leave_out=[1])
    split = (BnConfig(True, False, 8, "relu"), BnConfig(False, True, 4, "tanh", original_ln_before=True))
    yield "union_of_bottlenecks", ConfigUnion(*split)
    yield "union_with_lora", ConfigUnion(SeqBnConfig(reduction_factor=8), LoRAConfig(r=2, alpha=4))


def build(arguments: Mapping[str, Any], seed: int) -> Any:
    """A base whose logits are far from ties, its biases and norms not what they start as."""
    config = AutoConfig.for_model(**arguments)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        _randomise(parameter)
    return model


def _randomise(parameter: torch.Tensor, centre: float = 0.0) -> None:
    with torch.no_grad():
        parameter.add_(torch.randn_like(parameter), alpha=0.25)
        parameter.add_(centre)


@torch.no_grad()
def observe(model: Any) -> dict[str, torch.Tensor]:
    """One prompt's logits, and the tokens the library goes on with, without any cache."""
    ids = torch.randint(0, 64, (1, 10), generator=torch.Generator().manual_seed(7))
    logits, tokens = model(ids, use_cache=False).logits, ids
    for _ in range(NEW_TOKENS):
        following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], dim=1)
    return {"ids": ids.int(), "logits": logits, "tokens": tokens[:, ids.shape[1] :].int()}


def save(model: Any, folder: Path) -> None:
    """As the library saves, with tensors that two names share stored under both: safetensors refuses them otherwise."""
    loader = adapters.loading.AdapterLoader(model)
    tensors, config = loader.save_to_state_dict(NAME)
    folder.mkdir(parents=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    interface = getattr(model.base_model, "adapter_interface", None)
    if interface is not None:
        interface._save(folder, model.config)


def make(model_name: str, case: str, config: Any, expected: dict[str, torch.Tensor]) -> None:
    seed = list(MODELS).index(model_name)
    model = build(MODELS[model_name], seed)
    adapters.init(model)
    base = set(dict(model.named_parameters()))
    model.add_adapter(NAME, config=config)
    torch.manual_seed(zlib.crc32(f"{model_name}/{case}".encode()))
    for name, parameter in model.named_parameters():
        if name not in base:
            _randomise(parameter)
    model.set_active_adapters(NAME)
    save(model.eval(), FOLDER / "cases" / model_name / case)
    expected |= {f"{model_name}/{case}/{key}": value for key, value in observe(model).items() if key != "ids"}


def fields() -> dict[str, dict[str, Any]]:
    """Every field of the config classes and its default, for the test that each of them is classified."""
    found: dict[str, dict[str, Any]] = {}
    for name, config in {"bottleneck": BnConfig, "lora": LoRAConfig}.items():
        found[name] = {field.name: _default(field) for field in dataclasses.fields(config)}
    interface = dataclasses.fields(adapters.AdapterModelInterface)
    return {**found, "interface": {field.name: _default(field) for field in interface}}


def _default(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required" if field.default is dataclasses.MISSING else field.default


def main() -> None:
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "bases").mkdir(parents=True)
    expected: dict[str, torch.Tensor] = {}
    for seed, (name, arguments) in enumerate(MODELS.items()):
        base = build(arguments, seed)
        state = {key: tensor for key, tensor in base.state_dict().items() if key != "lm_head.weight" or name != "gpt2"}
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, FOLDER / "bases" / f"{name}.safetensors")
        seen = observe(base)
        expected |= {"ids": seen["ids"], f"{name}/logits": seen["logits"], f"{name}/tokens": seen["tokens"]}
    for model_name, case, config in cases():
        make(model_name, case, config, expected)
    save_file(expected, FOLDER / "expected.safetensors")
    (FOLDER / "models.json").write_text(json.dumps(MODELS, indent=1) + "\n")
    (FOLDER / "fields.json").write_text(json.dumps(fields(), indent=1) + "\n")
    for file in FOLDER.rglob("*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    main()
