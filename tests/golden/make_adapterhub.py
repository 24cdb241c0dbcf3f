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
from adapters import (
    AutoAdapterModel,
    BnConfig,
    CompacterConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    DvoRAConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MTLLoRAConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    VeraConfig,
)
from adapters.heads import CausalLMHead, ClassificationHead, TaggingHead
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

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
        if model != "gpt2":  # the library cannot add it to GPT-2's transposed modules
            yield model, "dora", DoRAConfig(**lora, attn_matrices=["q", "k", "v"])
        if model in PREFIXED:
            yield model, "prefix", PrefixTuningConfig(prefix_length=5, bottleneck_size=8)
            yield model, "prefix_flat", PrefixTuningConfig(prefix_length=3, flat=True)
    yield "phi", "parallel_attention", BnConfig(True, False, 8, "tanh", is_parallel=True)
    yield "gpt2", "lora_k", LoRAConfig(r=2, alpha=5, attn_matrices=["k"])
    yield "gpt2", "ia3_alpha", IA3Config(alpha=2, attn_matrices=["q", "v"])
    yield "gpt2", "vera", VeraConfig(r=3, selfattn_lora=False, intermediate_lora=True)
    yield "phi", "vera", VeraConfig(r=3, alpha=6)
    yield "phi", "dvora", DvoRAConfig(r=3, alpha=6)
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
    prefix = PrefixTuningConfig(prefix_length=4, bottleneck_size=6)
    yield "union_with_prefix", ConfigUnion(prefix, LoRAConfig(r=2, alpha=4), SeqBnConfig(reduction_factor=8))
    yield "mam", ConfigUnion(prefix, ParBnConfig(reduction_factor=8))
    yield "prefix_activation", PrefixTuningConfig(prefix_length=2, bottleneck_size=6, non_linearity="gelu")
    yield "ia3_all", IA3Config(attn_matrices=["q", "k", "v"], output_lora=True, leave_out=[1])
    yield "vera_kv", VeraConfig(r=3, attn_matrices=["k", "v"], leave_out=[0])


def refused() -> Iterator[tuple[str, str, Any]]:
    """What the library saves and the server does not serve: (model, case, config)."""
    yield "llama", "prefix_leave_out", PrefixTuningConfig(prefix_length=3, flat=True, leave_out=[0])
    yield "llama", "prefix_gates", PrefixTuningConfig(prefix_length=3, flat=True, use_gating=True, shared_gating=False)
    yield "llama", "bottleneck_gates", SeqBnConfig(reduction_factor=8, use_gating=True)
    yield "llama", "lora_gates", LoRAConfig(r=2, use_gating=True)
    yield "llama", "ia3_gates", IA3Config(use_gating=True)
    yield "llama", "compacter", CompacterConfig(reduction_factor=8, phm_dim=2)
    yield "llama", "invertible", SeqBnInvConfig(reduction_factor=8)
    yield "llama", "reft", LoReftConfig()
    yield "llama", "mtl_lora", MTLLoRAConfig(r=2, n_up_projection=2)
    yield "gpt2", "dora", DoRAConfig(r=2, attn_matrices=["q"])  # saved with a magnitude that its forward ignores
    yield "gpt2", "vera", VeraConfig(r=2)  # saved, and then its forward crashes


#: Models the library has a class of its own for; only these have prefix tuning and named heads.
PREFIXED = ("llama", "mistral", "gpt2")


def heads() -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(model, case, kind of head, arguments)."""
    names = {0: "no", 1: "yes"}
    for model in PREFIXED:
        yield model, "classification", "classification", {"num_labels": 3}
        yield model, "tagging", "tagging", {"num_labels": 2, "id2label": names}
    yield "llama", "linear", "classification", {"num_labels": 2, "layers": 1, "id2label": names}
    yield "llama", "no_activation", "classification", {"num_labels": 2, "activation_function": None}
    yield "llama", "deep_tagging", "tagging", {"num_labels": 3, "layers": 2, "activation_function": "gelu"}
    yield "llama", "multilabel", "classification", {"num_labels": 3, "multilabel": True}
    yield "llama", "regression", "classification", {"num_labels": 1}
    yield "llama", "three_layers", "classification", {"num_labels": 2, "layers": 3}
    yield "llama", "question_answering", "qa", {}
    yield "llama", "causal_lm", "causal_lm", {"layers": 1}
    yield "llama", "causal_lm_deep", "causal_lm", {"layers": 2}


#: Heads that transformers' own classes have, saved without a name: (model, case, class).
STATIC = [
    ("llama", "static_classification", AutoModelForSequenceClassification),
    ("qwen2", "static_tagging", AutoModelForTokenClassification),
    ("gpt2", "static_tagging", AutoModelForTokenClassification),
    ("phi", "static_classification", AutoModelForSequenceClassification),
    ("mistral", "static_causal_lm", AutoModelForCausalLM),
]


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


@torch.no_grad()
def observe_head(model: Any) -> dict[str, torch.Tensor]:
    """The same prompt's scores: [k] of a classification, [T, k] of a head that scores every token."""
    ids = torch.randint(0, 64, (1, 10), generator=torch.Generator().manual_seed(7))
    seen = model(ids, use_cache=False)
    return {"scores": (seen.logits if "logits" in seen else torch.stack([seen.start_logits, seen.end_logits], -1))[0].clone()}


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


def adapted(model_name: str, case: str, config: Any) -> Any:
    """A base with an adapter of random weights, active."""
    model = build(MODELS[model_name], list(MODELS).index(model_name))
    adapters.init(model)
    base = set(dict(model.named_parameters()))
    model.add_adapter(NAME, config=config)
    _randomise_new(model, base, f"{model_name}/{case}")
    model.set_active_adapters(NAME)
    return model.eval()


def _randomise_new(model: Any, base: set[str], seed: str) -> None:
    torch.manual_seed(zlib.crc32(seed.encode()))
    for name, parameter in model.named_parameters():
        if name not in base:
            _randomise(parameter)


def make(model_name: str, case: str, config: Any, expected: dict[str, torch.Tensor]) -> None:
    model = adapted(model_name, case, config)
    save(model, FOLDER / "cases" / model_name / case)
    expected |= {f"{model_name}/{case}/{key}": value for key, value in observe(model).items() if key != "ids"}


def make_head(model_name: str, case: str, kind: str, arguments: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    """A head of the library's own, with a bottleneck under it, on the base's weights."""
    config = AutoConfig.for_model(**MODELS[model_name])
    model = AutoAdapterModel.from_config(config, attn_implementation="eager").eval()
    _take_weights(model, model_name)
    base = set(dict(model.named_parameters()))
    model.add_adapter(NAME, config=SeqBnConfig(reduction_factor=16))
    getattr(model, f"add_{kind}_head")(NAME, **arguments)
    _finish_head(model, model_name, case, base, expected)


def make_static_head(model_name: str, case: str, kind: Any, expected: dict[str, torch.Tensor]) -> None:
    config = AutoConfig.for_model(**MODELS[model_name], num_labels=3)
    torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation="eager").eval()
    adapters.init(model)
    _take_weights(model, model_name)
    trained = {name for name, _ in model.named_parameters() if name.startswith(("score.", "classifier."))}
    base = set(dict(model.named_parameters())) - trained
    model.add_adapter(NAME, config=SeqBnConfig(reduction_factor=16))
    _finish_head(model, model_name, case, base, expected)


def _take_weights(model: Any, model_name: str) -> None:
    """The base's weights, where this class has them."""
    state = build(MODELS[model_name], list(MODELS).index(model_name)).state_dict()
    own = model.state_dict()
    loaded = model.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    assert not [key for key in loaded.missing_keys if key.startswith(f"{model.base_model_prefix}.")]


def _finish_head(model: Any, model_name: str, case: str, base: set[str], expected: dict[str, torch.Tensor]) -> None:
    _randomise_new(model, base, f"{model_name}/{case}")
    model.set_active_adapters(NAME)
    folder = FOLDER / "heads" / model_name / case
    save(model, folder)
    model.save_head(str(folder), NAME, use_safetensors=True)
    seen = observe(model) if "causal_lm" in case else observe_head(model)
    expected |= {f"heads/{model_name}/{case}/{key}": value for key, value in seen.items() if key != "ids"}


def fields() -> dict[str, dict[str, Any]]:
    """Every field of the config classes and its default, for the test that each of them is classified."""
    found: dict[str, dict[str, Any]] = {}
    for name, config in {"bottleneck": BnConfig, "lora": LoRAConfig, "prefix": PrefixTuningConfig}.items():
        found[name] = {field.name: _default(field) for field in dataclasses.fields(config)}
    interface = dataclasses.fields(adapters.AdapterModelInterface)
    found["interface"] = {field.name: _default(field) for field in interface}
    return {**found, **_head_fields()}


def _head_fields() -> dict[str, dict[str, Any]]:
    """Heads have no config classes, but a config each; where classification and tagging disagree there is no default."""
    model = AutoAdapterModel.from_config(AutoConfig.for_model(**MODELS["llama"]))
    classification, tagging = ClassificationHead(model, NAME).config, TaggingHead(model, NAME).config
    shared = {name: "required" for name in tagging if tagging[name] != classification[name]}
    lm = {**CausalLMHead(model, NAME).config, "head_type": "required"}
    return {"head": classification | shared, "lm_head": lm}


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
    for model_name, case, config in refused():
        save(adapted(model_name, case, config), FOLDER / "refused" / model_name / case)
    for model_name, case, kind, arguments in heads():
        make_head(model_name, case, kind, arguments, expected)
    for model_name, case, kind in STATIC:
        make_static_head(model_name, case, kind, expected)
    save_file(expected, FOLDER / "expected.safetensors")
    (FOLDER / "models.json").write_text(json.dumps(MODELS, indent=1) + "\n")
    (FOLDER / "fields.json").write_text(json.dumps(fields(), indent=1) + "\n")
    for file in FOLDER.rglob("*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    main()
