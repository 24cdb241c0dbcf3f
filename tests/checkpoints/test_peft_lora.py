"""PEFT's LoRA files into neutral checkpoints: every field of the config honoured, or the upload refused by its name."""

from __future__ import annotations

import math

import pytest
import torch

from server.checkpoints.peft import read_peft
from server.errors import AdapterError

Q, UP = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.1.mlp.up_proj"
EMBED, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
q, up, embed, head = (name.removeprefix("base_model.model.") for name in (Q, UP, EMBED, HEAD))

Tensors = dict[str, torch.Tensor]


def lora(*modules: str, rank: int = 4) -> Tensors:
    both = ((f"{m}.lora_{s}.weight", torch.ones((rank, 6) if s == "A" else (5, rank))) for m in modules for s in "AB")
    return dict(both)


def embedding(rank: int = 4) -> Tensors:
    return {f"{EMBED}.lora_embedding_A": torch.ones(rank, 9), f"{EMBED}.lora_embedding_B": torch.ones(6, rank)}


def magnitudes(*modules: str) -> Tensors:
    return {f"{module}.lora_magnitude_vector": torch.ones(5) for module in modules}


def config(**fields: object) -> dict[str, object]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | fields


def scales(tensors: Tensors, **fields: object) -> dict[str, float]:
    return read_peft(config(**fields), tensors)[0].config["scale"]  # type: ignore[return-value]


def names(sites: dict[str, Tensors]) -> dict[str, list[str]]:
    return {module: sorted(tensors) for module, tensors in sites.items()}


# --- what is read ---------------------------------------------------------------------------------------------------


def test_tensors_are_sorted_by_module():
    (checkpoint,) = read_peft(config(), lora(Q, UP))
    assert checkpoint.method == "lora"
    assert names(checkpoint.sites) == {q: ["A", "B"], up: ["A", "B"]}


def test_the_scale_is_alpha_over_rank_or_over_its_root():
    assert scales(lora(Q, UP)) == {q: 2.0, up: 2.0}
    assert scales(lora(Q, UP), use_rslora=True) == {q: 4.0, up: 4.0}
    assert scales(lora(Q, UP), lora_alpha=1.5)[q] == 0.375
    assert scales(lora(Q, rank=9), r=9, use_rslora=True, lora_alpha=6)[q] == 6 / math.sqrt(9)


def test_patterns_change_the_scale_of_the_modules_they_name_first():
    tensors = lora(Q) | lora(UP, rank=2)
    assert scales(tensors, rank_pattern={"up_proj": 2}) == {q: 2.0, up: 4.0}
    assert scales(tensors, rank_pattern={r".*(1|2)\.mlp.*": 2, "up_proj": 7}) == {q: 2.0, up: 4.0}
    alphas = {"q_proj": 16, "layers.0.self_attn.q_proj": 32, "(.|..)+proj": 64}
    assert scales(tensors, rank_pattern={"up_proj": 2}, alpha_pattern=alphas) == {q: 4.0, up: 32.0}


def test_trained_biases_become_a_bitfit_checkpoint_beside_the_lora():
    biases = {f"{Q}.base_layer.bias": torch.ones(5), "base_model.model.model.norm.bias": torch.ones(6)}
    first, second = read_peft(config(bias="all"), lora(Q) | biases)
    assert (first.method, second.method) == ("lora", "bitfit")
    assert names(second.sites) == {q: ["bias"], "model.norm": ["bias"]}


def test_embeddings_and_the_head_read_like_any_module():
    copies = {f"{EMBED}.base_layer.weight": torch.ones(9, 6), f"{HEAD}.base_layer.weight": torch.ones(9, 6)}
    tensors = embedding(2) | lora(HEAD) | copies
    (checkpoint,) = read_peft(config(target_modules=["embed_tokens", "lm_head"], rank_pattern={"embed_tokens": 2}), tensors)
    assert names(checkpoint.sites) == {embed: ["A", "B", "base"], head: ["A", "B", "base"]}
    assert checkpoint.config == {"scale": {embed: 4.0, head: 2.0}}


def test_a_head_that_follows_its_embedding_need_not_be_named():
    (checkpoint,) = read_peft(config(target_modules=["embed_tokens"], ensure_weight_tying=True), embedding() | lora(HEAD))
    assert checkpoint.sites.keys() == {embed, head}


def test_a_dora_keeps_its_magnitudes():
    (checkpoint,) = read_peft(config(use_dora=True), lora(Q, UP) | magnitudes(Q, UP))
    assert checkpoint.method == "dora"
    assert names(checkpoint.sites) == {q: ["A", "B", "magnitude"], up: ["A", "B", "magnitude"]}


TARGETED = [
    {"target_modules": ["q_proj", "mlp.up_proj"]},
    {"target_modules": [q, up]},
    {"target_modules": r".*\.(self_attn|mlp)\.(q|up)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear"},
    {"target_modules": None, "exclude_modules": ["k_proj", "proj"]},
    {"exclude_modules": r"q_proj|.*\.o_proj"},
    {"exclude_modules": []},
    {"layers_to_transform": [0, 1]},
    {"layers_to_transform": []},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"layers_to_transform": [0, 1], "layers_pattern": ["h", "lay(er)?s"]},
    {"layers_to_transform": [7], "target_modules": [q, up]},  # spelled out in full: the layers do not matter
]


@pytest.mark.parametrize("fields", TARGETED)
def test_what_the_config_targets_is_read(fields):
    assert scales(lora(Q, UP), **fields) == {q: 2.0, up: 2.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["k_proj"]},
        {"target_modules": "q_proj"},  # a string is held against the whole name
        {"target_modules": r".*\.1\..*"},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": r".*\.q_proj"},
        {"layers_to_transform": [1, 2]},
        {"layers_to_transform": 1},
        {"layers_to_transform": [0], "layers_pattern": "h"},
        {"layers_to_transform": [0], "layers_pattern": ["blocks", "^layers"]},
        {"layers_to_transform": [0], "layers_pattern": "self_attn|layers"},
    ],
)
def test_what_the_config_does_not_target_is_refused_as_peft_drops_it(fields):
    """The oracle is PEFT's own matcher."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    matched = check_target_module_exists(LoraConfig(**{"target_modules": ["q_proj"]} | fields), q)
    assert not matched or isinstance(matched, _ExcludedModule)
    field = next(iter(fields))
    with pytest.raises(AdapterError, match=f"^{field}: .*{q}, for which the upload holds tensors"):
        read_peft(config(**fields), lora(Q))


def test_the_layer_is_the_first_number_as_in_peft():
    experts = "base_model.model.model.layers.1.experts.0.up_proj"
    assert scales(lora(experts), layers_to_transform=1) != {}
    with pytest.raises(AdapterError, match=r"layers_to_transform: leaves out model.layers.1.experts.0.up_proj"):
        read_peft(config(layers_to_transform=0), lora(experts))


# --- what is refused ------------------------------------------------------------------------------------------------

BIAS = {f"{Q}.base_layer.bias": torch.ones(5)}


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({}, {f"{Q}.lora_A.weight": torch.ones(4, 6)}, f"^{Q}.lora_B.weight: is missing although lora_A is there"),
        ({}, {f"{Q}.lora_B.weight": torch.ones(5, 4)}, f"^{Q}.lora_A.weight: is missing although lora_B is there"),
        ({}, lora(Q, rank=3), f"^{Q}.lora_A.weight: has rank 3, the config says 4"),
        ({"rank_pattern": {"up_proj": 3}}, lora(Q, rank=3), "has rank 3, the config says 4"),
        ({"rank_pattern": {".*q_.*": 2, "q_proj": 3}}, lora(Q, rank=3), "has rank 3, the config says 2"),
        (
            {"rank_pattern": {r"(q)\2": 2}},
            lora(Q),
            r"^rank_pattern: '\(q\).*' is no regular expression that is served",
        ),
        ({"alpha_pattern": {"(?=q)": 2}}, lora(Q), r"^alpha_pattern: '\(\?=q\)' is no regular expression that is served"),
        ({"target_modules": "(?<!x)q_proj"}, lora(Q), r"^target_modules: '\(\?<!x\)q_proj' is no regular expression"),
        ({"exclude_modules": "(q"}, lora(Q), r"^exclude_modules: '\(q' is no regular expression"),
        ({"layers_to_transform": 0, "layers_pattern": "(h"}, lora(Q), r"^layers_pattern: '\(h' is no regular expression"),
        ({"layers_to_transform": 0, "target_modules": ".*"}, lora(Q), "^layers_to_transform: is not defined where target"),
        ({"target_modules": "all-linear"}, lora(HEAD), "^target_modules: does not name lm_head"),
        ({"target_modules": ["q_proj"]}, lora(HEAD), "^target_modules: does not name lm_head"),
        ({"lora_bias": True}, lora(Q), f"^{Q}.lora_B.bias: is missing, but lora_bias is True"),
        ({}, lora(Q) | {f"{Q}.lora_B.bias": torch.ones(5)}, f"^{Q}.lora_B.bias: is stored, but lora_bias is False"),
        ({}, lora(Q) | BIAS, f"^{Q}.base_layer.bias: matches nothing"),
        ({"bias": "all"}, lora(Q) | BIAS | {f"{Q}.bias": torch.ones(5)}, f"^{Q}.bias: is stored twice"),
        ({}, lora(EMBED) | embedding(), "is stored twice, once as an embedding's and once as a Linear's"),
        ({}, {f"{EMBED}.base_layer.weight": torch.ones(2, 9)}, "lora_A.weight: is missing although another tensor"),
        ({}, lora(Q) | magnitudes(Q), f"^{Q}.lora_magnitude_vector: is stored, but use_dora is False"),
        ({"use_dora": True}, lora(Q, UP) | magnitudes(Q), f"^{UP}.lora_magnitude_vector: is missing, but use_dora is True"),
        ({"use_dora": True, "lora_bias": True}, lora(Q), "^lora_bias: is not defined together with use_dora"),
        ({"use_dora": "yes"}, lora(Q), "^use_dora: Input should be a valid boolean"),
        ({}, {f"{Q}.lora_A.default.weight": torch.ones(2, 9)}, "matches nothing"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(fields, tensors, message):
    with pytest.raises(AdapterError, match=message):
        read_peft(config() | fields, tensors)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 4], [2, 5]]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {}),
        ("velora_config", {}),
        ("monteclora_config", {}),
        ("kasa_config", {}),
        ("megatron_config", {}),
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {}),
        ("lora_ga_config", {}),
        ("enable_lora", [True, False, True]),
        *(("init_lora_weights", value) for value in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
    ],
)
def test_variants_that_are_not_served_are_refused_by_name(field, value):
    with pytest.raises(AdapterError, match=f"^{field}: .* is not served"):
        read_peft(config(**{field: value}), lora(Q))


@pytest.mark.parametrize("value", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_served(value):
    assert scales(lora(Q), init_lora_weights=value, lora_dropout=0.1, fan_in_fan_out=True) == {q: 2.0}
