"""What the classification of AdapterHub's config fields promises, shown on files that its library wrote (tests/golden).

As test_field_proofs.py for PEFT: an honoured field makes another adapter or is held against the tensors, a cosmetic one
changes nothing, a refused one is named. The classes are held against the library's own fields in test_adapterhub.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

import pytest

from server.checkpoints import adapterhub_fields as fields
from tests.checkpoints.golden import base_of, upload
from tests.checkpoints.saved import ANYTHING, CONFIG, OTHER, SAME, Saved

INTERFACE: Final = "adapter_interface.json"
HEAD: Final = "head_config.json"
Open = Callable[[str, str], Saved]


class Kind:
    """One class of fields: the file and the object they stand in, and an upload that has them all."""

    def __init__(self, model: type[fields.Fields], case: str, file: str = CONFIG, inside: str = "config") -> None:
        self.model = model
        self.case = case
        self.file = file
        self.inside = inside

    @property
    def where(self) -> str:
        """What stands before the field's name in a refusal."""
        shown = "" if self.file == CONFIG else f"{self.file}: "
        return shown + (f"{self.inside}." if self.inside == "config" else "")


KINDS: Final[Mapping[str, Kind]] = {
    "upload": Kind(fields.UploadFields, "cases/llama/lora", inside=""),
    "bottleneck": Kind(fields.BottleneckFields, "cases/llama/double_seq_bn"),
    "lora": Kind(fields.LoraFields, "cases/llama/lora"),
    "prefix": Kind(fields.PrefixFields, "cases/llama/prefix"),
    "union": Kind(fields.UnionFields, "cases/llama/union_of_bottlenecks"),
    "interface": Kind(fields.InterfaceFields, "cases/qwen2/double_seq_bn", INTERFACE, "interface"),
    "head_upload": Kind(fields.HeadUploadFields, "heads/llama/static_classification", HEAD, ""),
    "head": Kind(fields.HeadFields, "heads/llama/classification", HEAD),
    "lm_head": Kind(fields.LmHeadFields, "heads/llama/causal_lm", HEAD),
}


@pytest.fixture(scope="module")
def open_saved(tmp_path_factory: pytest.TempPathFactory) -> Open:
    scratch = tmp_path_factory.mktemp("saved") / "changed.json"

    @cache
    def opened(kind: str, case: str) -> Saved:
        group, _, rest = case.partition("/")
        found = KINDS[kind]
        return Saved(upload(group, rest), base_of(rest.partition("/")[0]), scratch, found.file, found.inside)

    return opened


def pairs(group: str) -> list[tuple[str, str]]:
    return [(kind, field) for kind, found in KINDS.items() for field in sorted(getattr(found.model, group))]


@pytest.mark.parametrize(("kind", "field"), pairs("cosmetic"))
def test_a_cosmetic_field_changes_nothing_that_is_served(kind: str, field: str, open_saved: Open) -> None:
    saved = open_saved(kind, KINDS[kind].case)
    assert {saved.outcome(**{field: value}) for value in ANYTHING} == {SAME}


@pytest.mark.parametrize(("kind", "field"), pairs("refused"))
def test_a_refused_field_is_named_unless_it_has_its_default(kind: str, field: str, open_saved: Open) -> None:
    found = KINDS[kind]
    saved, (neutral, why) = open_saved(kind, found.case), found.model.refused[field]
    for value in (*ANYTHING, neutral):
        outcome = saved.outcome(**{field: value})
        if value == neutral:
            assert outcome == SAME
        else:
            assert outcome.startswith(f"{found.where}{field}: {fields.shown(value)} is not served: {why}")


#: (upload or None for the kind's own, another value) -> what comes of it: another adapter, or the beginning of the refusal.
Proof = tuple[str | None, object, str]
_GIVEN: Final = "model.layers.0.{}: no config gives layer 0 an adapter after {}"
_AFTER: Final = "adapters.golden"
_NO_PLACE: Final = "is not a place the library gives"
_BEHIND: Final = f"{INTERFACE}: puts adapters behind"
_SELF: Final = "model.layers.0.self_attn"
_PREFIX: Final = f"{_SELF}.prefix_tuning.pool.prefix_tunings.golden.self_prefix"
_NO_LORA: Final = "is stored, but the config gives it no LoRA"

HONOURED: Final[Mapping[str, Mapping[str, Proof]]] = {
    "upload": {
        "config": (None, {"architecture": "lora", "r": 7}, "model.layers.0.mlp.down_proj.loras.golden"),
        "name": (None, "other", "model.layers.0.mlp.down_proj.loras.golden.lora_A: belongs to no "),
        "version": (None, "adapters.x", "version: String should match pattern"),
        "model_type": (None, "gpt2", "model_type: 'gpt2' is not the base model's, 'llama'"),
        "hidden_size": (None, 64, "hidden_size: 64 is not the base model's, 32"),
    },
    "bottleneck": {
        "mh_adapter": (None, False, _GIVEN.format(f"attention_adapters.{_AFTER}", "attention")),
        "output_adapter": (None, False, _GIVEN.format(f"output_adapters.{_AFTER}", "feed-forward")),
        "reduction_factor": (None, 4, f"model.layers.0.attention_adapters.{_AFTER}.adapter_down.0.weight: has shape [4, 32]"),
        "non_linearity": (None, "tanh", OTHER),
        "original_ln_before": (None, True, OTHER),
        "original_ln_after": (None, False, OTHER),
        "ln_before": (None, True, f"model.layers.0.attention_adapters.{_AFTER}.adapter_down.1.weight: is missing"),
        "ln_after": (None, True, f"model.layers.0.attention_adapters.{_AFTER}.adapter_norm_after.weight: is missing"),
        "is_parallel": (None, True, OTHER),
        "scaling": (None, 0.5, OTHER),
        "residual_before_ln": ("cases/llama/seq_before1_after1_residual1", False, OTHER),
        "adapter_residual_before_ln": ("cases/llama/norm_after", True, "config.adapter_residual_before_ln: true together with"),
        "leave_out": (None, [1], f"model.layers.1.attention_adapters.{_AFTER}: no config gives layer 1 an adapter"),
    },
    "lora": {
        "selfattn_lora": (None, False, f"{_SELF}.q_proj.loras.golden: {_NO_LORA}"),
        "intermediate_lora": (None, False, f"model.layers.0.mlp.down_proj.loras.golden: {_NO_LORA}"),
        "output_lora": (None, False, f"model.layers.0.mlp.up_proj.loras.golden: {_NO_LORA}"),
        "leave_out": (None, [1], f"model.layers.1.mlp.down_proj.loras.golden: {_NO_LORA}"),
        "r": (None, 7, "model.layers.0.mlp.down_proj.loras.golden.lora_A: has shape [3, 48]"),
        "alpha": (None, 7, OTHER),
        "attn_matrices": (None, ["q"], f"{_SELF}.v_proj.loras.golden: {_NO_LORA}"),
        "composition_mode": (None, "scale", "config.r: is 3; composition_mode 'scale' needs 1"),
        "use_dora": (None, True, "model.layers.0.mlp.down_proj.loras.golden.m.weight: is missing"),
        "vera_d": (None, 0.1, "config.vera_d: needs one pair of shared_parameters"),
        "vera_b": (None, 0.1, "config.vera_d: needs one pair of shared_parameters"),
    },
    "prefix": {
        "flat": (None, True, f"{_PREFIX}.control_trans: is missing"),
        "prefix_length": (None, 7, f"{_PREFIX}.wte.weight: has shape [5, 32]"),
        "bottleneck_size": (None, 7, f"{_PREFIX}.control_trans.0.weight: has shape"),
        "non_linearity": (None, "relu", OTHER),
    },
    "union": {
        "configs": (None, [{"architecture": "lora"}], "model.layers.0."),
    },
    "interface": {
        "layer_self_attn": (None, "attn", f"{_BEHIND} attn.o_proj; this base's exit is {_SELF}.o_proj"),
        "layer_output_proj": (None, "mlp.up_proj", f"{_BEHIND} mlp.up_proj; this base's exit is model.layers.0.mlp.down_proj"),
        "attn_o_proj": (None, "k_proj", f"{_BEHIND} self_attn.k_proj; this base's exit is {_SELF}.o_proj"),
        "layer_intermediate_proj": (
            "cases/qwen2/lora",
            "mlp.gate_proj",
            f"model.layers.0.mlp.up_proj.loras.golden: {_NO_PLACE}",
        ),
        "attn_q_proj": ("cases/qwen2/lora", "k_proj", f"{_SELF}.q_proj.loras.golden: {_NO_PLACE}"),
        "attn_v_proj": ("cases/qwen2/lora", "k_proj", f"{_SELF}.v_proj.loras.golden: {_NO_PLACE}"),
        "attn_k_proj": ("cases/qwen2/ia3", "o_proj", f"{_SELF}.k_proj.loras.golden: {_NO_PLACE}"),
        "attn_qkv_proj": ("cases/qwen2/lora", "qkv_proj", f"{_SELF}.q_proj.loras.golden: {_NO_LORA}"),
        "layer_pre_self_attn": ("cases/phi/parallel_attention", "mlp.fc1", f"{INTERFACE}: "),
        "layer_pre_ffn": ("cases/qwen2/par_bn", "mlp.up_proj", f"{INTERFACE}: "),
        "layer_ln_1": (None, "input_layernorm", f"{INTERFACE}: gives the adapter behind self_attn.o_proj the base's"),
        "layer_ln_2": (None, "input_layernorm", f"{INTERFACE}: gives the adapter behind mlp.down_proj the base's"),
    },
    "head_upload": {
        "config": (None, {"head_type": "tagging", "layers": 1}, f"{HEAD}: name: is missing"),
        "name": ("heads/llama/classification", "other", "heads.golden."),
        "model_class": (None, "LlamaForTokenClassification", OTHER),
        "model_type": (None, "gpt2", f"{HEAD}: model_type: 'gpt2' is not the base model's, 'llama'"),
        "hidden_size": (None, 64, f"{HEAD}: hidden_size: 64 is not the base model's, 32"),
        "num_labels": (None, 7, "score.weight: has shape [3, 32]"),
        "label2id": (None, {"a": 0, "b": 1, "c": 2}, OTHER),
    },
    "head": {
        "head_type": (None, "tagging", OTHER),
        "num_labels": (None, 7, "heads.golden.4.weight: has shape [3, 32]"),
        "layers": (None, 1, "heads.golden."),
        "activation_function": (None, "relu", OTHER),
        "label2id": (None, {"a": 0, "b": 1, "c": 2}, OTHER),
        "bias": (None, False, "heads.golden.4.bias: is not a tensor that the config gives"),
    },
    "lm_head": {
        "head_type": (None, "tagging", f"{HEAD}: config."),
        "layers": (None, 2, f"{HEAD}: config.layers: Input should be less than or equal to 1"),
        "bias": (None, False, "heads.golden.0.bias: is not a tensor that the config gives"),
    },
}


@pytest.mark.parametrize(("kind", "field"), pairs("model_fields"))
def test_an_honoured_field_makes_another_adapter_or_is_held_against_the_tensors(
    kind: str, field: str, open_saved: Open
) -> None:
    case, value, expected = HONOURED[kind][field]
    outcome = open_saved(kind, case or KINDS[kind].case).outcome(**{field: value})
    assert outcome == expected if expected == OTHER else outcome.startswith(expected), outcome


def test_every_class_of_fields_has_its_proofs() -> None:
    served = {*fields.ARCHITECTURES.values(), *fields.HEADS.values()}
    assert served <= {kind.model for kind in KINDS.values()}
    assert {kind: set(found.model.model_fields) for kind, found in KINDS.items()} == {k: set(v) for k, v in HONOURED.items()}
