"""AdapterHub's dialect against what its own library computed (tests/golden), and every refusal by the field it names."""

from __future__ import annotations

import contextlib
import copy
import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from server.checkpoints import adapterhub_fields, read_checkpoints
from server.checkpoints.adapterhub import is_adapterhub, read_adapterhub
from server.errors import AdapterError
from server.methods.base import BaseShape, Checkpoint, Limits, Method, Op, Part, Rows
from server.methods.bottleneck import Bottleneck
from server.methods.grouped import rows_of
from server.methods.ia3 import IA3
from server.methods.lora import Lora
from tests.checkpoints.golden import CPU, GOLDEN, MODELS, base_of, build, cases, expectations, files, upload

CASES = cases("cases")
#: Cases that are more than ops at modules; test_adapterhub_served.py has them.
PREFIXED = [case for case in CASES if "prefix" in case or case.endswith("mam")]
METHODS: Mapping[str, Method] = {method.name: method for method in (Bottleneck(), Lora(), IA3())}
SLOT = 2


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return expectations()


class Served:
    """A base whose every token goes through one adapter's ops, attached as the engine attaches them."""

    def __init__(self, name: str, checkpoints: tuple[Checkpoint, ...]) -> None:
        self.model = copy.deepcopy(build(name))
        self._taps: dict[str, Tensor] = {}
        base = base_of(name)
        ops: dict[str, list[Op]] = defaultdict(list)
        for part in (METHODS[c.method].read(c, base, Limits()) for c in checkpoints):
            for module in part.sites:
                ops[module].append(_op(part, module, base))
        for module, found in ops.items():
            self._attach(module, sorted(found, key=lambda op: op.order))

    def _attach(self, module: str, ops: list[Op]) -> None:
        for name in {tap for op in ops for tap in op.taps}:
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: self._taps.__setitem__(name, args[0].flatten(0, -2))
            )

        def after(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            flat, x = y.flatten(0, -2), args[0].flatten(0, -2)
            for op in ops:
                flat = op.after(x, flat, self._rows(len(x)))
            return flat.view_as(y)

        self.model.get_submodule(module).register_forward_hook(after)

    def _rows(self, tokens: int) -> Rows:
        rows = rows_of([SLOT] * tokens)
        rows.taps = self._taps
        return rows

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits

    def greedy(self, ids: Tensor, count: int) -> Tensor:
        tokens = ids
        for _ in range(count):
            tokens = torch.cat([tokens, self.logits(tokens)[:, -1:].argmax(-1)], dim=1)
        return tokens[:, ids.shape[1] :]


def _op(part: Part, module: str, base: BaseShape) -> Op:
    op = METHODS[part.method].op(part, module, base, CPU, torch.float32)
    op.grow(SLOT + 1)
    op.put(SLOT, part.sites[module])
    return op


def read(case: str) -> tuple[Checkpoint, ...]:
    """As an upload of the saved folder."""
    return read_checkpoints(upload("cases", case), base_of(case.partition("/")[0]))


@pytest.mark.parametrize("name", MODELS)
def test_the_bases_are_the_ones_the_library_ran(name: str, expected: dict[str, Tensor]) -> None:
    assert torch.allclose(Served(name, ()).logits(expected["ids"].long()), expected[f"{name}/logits"], atol=1e-4)


@pytest.mark.parametrize("case", sorted(set(CASES) - set(PREFIXED)))
def test_every_case_computes_what_the_library_computes(case: str, expected: dict[str, Tensor]) -> None:
    served, ids = Served(case.partition("/")[0], read(case)), expected["ids"].long()
    tokens = expected[f"{case}/tokens"]
    assert torch.allclose(served.logits(ids), expected[f"{case}/logits"], atol=1e-4)
    assert torch.equal(served.greedy(ids, tokens.shape[1]), tokens.long())


@pytest.mark.parametrize("case", CASES)
def test_every_case_moves_the_logits(case: str, expected: dict[str, Tensor]) -> None:
    base = expected[f"{case.partition('/')[0]}/logits"]
    assert (expected[f"{case}/logits"] - base).abs().max() > 0.05


# --- Names -----------------------------------------------------------------------------------------------------------


def test_detects_the_dialect() -> None:
    config, _, _ = files("llama/seq_bn")
    assert is_adapterhub(config)
    assert not is_adapterhub({"peft_type": "LORA", "r": 8})
    assert not is_adapterhub({})


def renamed(tensors: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def same(one: tuple[Checkpoint, ...], other: tuple[Checkpoint, ...]) -> bool:
    def flat(checkpoints: tuple[Checkpoint, ...]) -> dict[tuple[str, str, str], list[float]]:
        return {
            (c.method, module, name): tensor.flatten().tolist()
            for c in checkpoints
            for module, tensors in c.sites.items()
            for name, tensor in tensors.items()
        }

    return flat(one) == flat(other)


@pytest.mark.parametrize("case", ["llama/double_seq_bn", "llama/lora", "gpt2/double_seq_bn", "gpt2/lora"])
def test_reads_the_keys_of_a_bare_model(case: str) -> None:
    """`LlamaModel` and `GPT2Model` have no "model." or "transformer." in front."""
    config, tensors, _ = files(case)
    base = base_of(case.partition("/")[0])
    bare = {key.partition(".")[2]: tensor for key, tensor in tensors.items()}
    assert same(read_adapterhub(config, bare, base), read(case))


def test_the_adapters_name_may_be_anything_a_key_can_hold() -> None:
    config, tensors, _ = files("llama/union_with_lora")
    for name in ("x", "(.|..)+!", "loras", "adapters", "golden.golden"):
        read_again = read_adapterhub({**config, "name": name}, renamed(tensors, ".golden.", f".{name}."), base_of("llama"))
        assert same(read_again, read("llama/union_with_lora"))


def test_an_early_lora_is_read_with_alpha_of_r() -> None:
    """As the library reads it: before 1.1.0 it applied such an adapter with scale 1."""
    config, tensors, _ = files("llama/lora")
    base = base_of("llama")

    def scales(version: str) -> set[float]:
        (checkpoint,) = read_adapterhub({**config, "version": version}, tensors, base)
        return set(checkpoint.config["scale"].values())

    assert scales("adapters.1.0.1") == scales("adapters.0.2.2") == {1.0}
    assert scales("adapters.1.1.0") == scales("adapters.1.3.0") == {2.0}


def test_both_copies_of_a_norm_must_agree() -> None:
    config, tensors, _ = files("llama/norm_before")
    key = "model.layers.1.output_adapters.adapters.golden.adapter_norm_before.bias"
    tensors[key] = tensors[key] + 1
    with pytest.raises(AdapterError, match=r"adapter_norm_before\.bias: differs"):
        read_adapterhub(config, tensors, base_of("llama"))


def test_one_copy_of_a_norm_is_enough() -> None:
    config, tensors, _ = files("llama/norm_before")
    single = {key: tensor for key, tensor in tensors.items() if "norm_before" not in key}
    assert len(single) < len(tensors)
    assert same(read_adapterhub(config, single, base_of("llama")), read("llama/norm_before"))


# --- Fields ----------------------------------------------------------------------------------------------------------

CLASSES = {
    "bottleneck": adapterhub_fields.BottleneckFields,
    "lora": adapterhub_fields.LoraFields,
    "prefix": adapterhub_fields.PrefixFields,
    "head": adapterhub_fields.HeadFields,
    "lm_head": adapterhub_fields.LmHeadFields,
    "interface": adapterhub_fields.InterfaceFields,
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_the_library_is_classified_once(name: str) -> None:
    library: dict[str, Any] = json.loads((GOLDEN / "fields.json").read_text())[name]
    fields = CLASSES[name]
    groups = [set(fields.model_fields), set(fields.cosmetic), set(fields.refused)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert set.union(*groups) == library.keys() - {"architecture"}


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_the_librarys(name: str) -> None:
    library: dict[str, Any] = json.loads((GOLDEN / "fields.json").read_text())[name]
    fields = CLASSES[name]
    for field, info in fields.model_fields.items():
        assert library[field] == ("required" if info.is_required() else info.default), field
    for field, (served, _) in fields.refused.items():
        assert library[field] == served, field


BOTTLENECK_REFUSALS: list[tuple[str, object]] = [
    ("use_gating", True),
    ("phm_layer", True),
    ("inv_adapter", "nice"),
    ("cross_adapter", True),
    ("non_linearity", "prelu"),
    ("non_linearity", "xielu"),
    ("non_linearity", "__import__"),
    ("non_linearity", None),
    ("residual_before_ln", "post_add"),
    ("scaling", "constant"),
    ("scaling", [1.0]),
    ("is_parallel", "yes"),
    ("mh_adapter", 1),
    ("reduction_factor", 0),
    ("reduction_factor", -2.0),
    ("reduction_factor", {"0": 8}),
    ("reduction_factor", "8"),
    ("leave_out", ["0"]),
    ("leave_out", [-1]),
    ("new_option", False),
]


@pytest.mark.parametrize(("field", "value"), BOTTLENECK_REFUSALS)
def test_a_bottleneck_option_that_is_not_served_is_named(field: str, value: object) -> None:
    config, tensors, _ = files("llama/seq_bn")
    config["config"][field] = value
    with pytest.raises(AdapterError, match=rf"^config\.{field}"):
        read_adapterhub(config, tensors, base_of("llama"))


def test_a_norm_around_the_adapters_own_residual_is_refused() -> None:
    config, tensors, _ = files("llama/norm_after")
    config["config"]["adapter_residual_before_ln"] = True
    with pytest.raises(AdapterError, match=r"^config\.adapter_residual_before_ln"):
        read_adapterhub(config, tensors, base_of("llama"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_gating", True),
        ("vera_d", 0.1),
        ("vera_d", "0.1"),
        ("use_dora", 1),
        ("r", 0),
        ("attn_matrices", ["q", "o"]),
        ("composition_mode", "multiply"),
        ("n_up_projection", 2),
    ],
)
def test_a_lora_option_that_is_not_served_is_named(field: str, value: object) -> None:
    config, tensors, _ = files("llama/lora")
    config["config"][field] = value
    with pytest.raises(AdapterError, match=rf"^config\.{field}"):
        read_adapterhub(config, tensors, base_of("llama"))


@pytest.mark.parametrize("architecture", ["prompt_tuning", "reft", "mtl_lora", "new", 3, ["lora"]])
def test_an_architecture_that_is_not_served_is_named(architecture: object) -> None:
    config, tensors, _ = files("llama/lora")
    config["config"]["architecture"] = architecture
    with pytest.raises(AdapterError, match=r"^config\.architecture"):
        read_adapterhub(config, tensors, base_of("llama"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "3.2.1"),
        ("version", "adapters.x"),
        ("version", None),
        ("model_type", "bert"),
        ("hidden_size", 768),
        ("name", ""),
        ("name", None),
        ("config", "seq_bn"),
        ("config", None),
    ],
)
def test_a_field_of_the_file_that_does_not_fit_is_named(field: str, value: object) -> None:
    config, tensors, _ = files("llama/seq_bn")
    with pytest.raises(AdapterError, match=rf"^{field}"):
        read_adapterhub({**config, field: value}, tensors, base_of("llama"))


def test_a_field_inside_a_union_is_named_with_its_place() -> None:
    config, tensors, _ = files("llama/union_with_lora")
    config["config"]["configs"][1]["use_gating"] = True
    with pytest.raises(AdapterError, match=r"^config\.configs\.1\.use_gating"):
        read_adapterhub(config, tensors, base_of("llama"))


HUGE = 10**400
SIZES: list[tuple[str, str, object]] = [
    ("llama/lora", "r", HUGE),
    ("llama/lora", "alpha", HUGE),
    ("llama/lora", "leave_out", [HUGE]),
    ("llama/lora", "leave_out", [0] * 1025),
    ("llama/ia3", "alpha", 1e300),
    ("llama/seq_bn", "reduction_factor", HUGE),
    ("llama/seq_bn", "reduction_factor", {"default": HUGE}),
    ("llama/seq_bn", "scaling", HUGE),
    ("llama/seq_bn", "scaling", float("inf")),
]


@pytest.mark.parametrize(("case", "field", "value"), SIZES, ids=lambda value: str(value)[:20])
def test_a_number_beyond_reason_is_named(case: str, field: str, value: object) -> None:
    config, tensors, _ = files(case)
    config["config"][field] = value
    with pytest.raises(AdapterError) as caught:
        read_adapterhub(config, tensors, base_of("llama"))
    assert caught.value.field.startswith(f"config.{field}")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "configs", [[], [{"architecture": "union", "configs": []}], [{"architecture": "lora"}, {"architecture": "lora"}]]
)
def test_a_union_that_is_not_served_is_named(configs: list[object]) -> None:
    config, tensors, _ = files("llama/lora")
    config["config"] = {"architecture": "union", "configs": configs}
    with pytest.raises(AdapterError, match=r"^config\.configs"):
        read_adapterhub(config, tensors, base_of("llama"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "default", "r"]), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=80, deadline=None)
@given(case=st.sampled_from(["llama/seq_bn", "gpt2/lora", "llama/union_with_lora", "phi/ia3"]), value=JSON, data=st.data())
def test_any_value_of_any_field_is_read_or_refused(case: str, value: object, data: st.DataObject) -> None:
    config, tensors, interface = files(case)
    places = [config, config["config"], *config["config"].get("configs", []), *((interface or {}).values())]
    place = data.draw(st.sampled_from([place for place in places if isinstance(place, dict)]))
    place[data.draw(st.sampled_from(sorted(place)))] = value
    with contextlib.suppress(AdapterError):
        read_adapterhub(config, tensors, base_of(case.partition("/")[0]), interface)


# --- Tensors ---------------------------------------------------------------------------------------------------------

SITE = "model.layers.1.output_adapters.adapters.golden"


def refused(case: str, **changes: Tensor | None) -> AdapterError:
    """What reading says when tensors are added or changed, or (None) taken away."""
    config, tensors, interface = files(case)
    changed = {key: value for key, value in {**tensors, **changes}.items() if value is not None}
    with pytest.raises(AdapterError) as caught:
        read_adapterhub(config, changed, base_of(case.partition("/")[0]), interface)
    return caught.value


def test_a_missing_tensor_is_named() -> None:
    assert refused("llama/seq_bn", **{f"{SITE}.adapter_up.bias": None}).field == f"{SITE}.adapter_up.bias"


def test_a_missing_layer_is_named() -> None:
    _, tensors, _ = files("llama/seq_bn")
    gone = {key: None for key in tensors if key.startswith("model.layers.1.")}
    assert str(refused("llama/seq_bn", **gone)).startswith("layer 1: has no adapter after feed-forward")


@pytest.mark.parametrize(
    "key",
    [
        f"{SITE}.gate.weight",
        f"{SITE}.adapter_down.0.phm_rule",
        "model.layers.1.output_adapters.adapters.other.adapter_up.bias",
        "model.invertible_adapters.golden.F.0.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_the_config_does_not_explain_is_named(key: str) -> None:
    assert refused("llama/seq_bn", **{key: torch.zeros(2)}).field == key


def test_a_site_under_two_paths_is_named() -> None:
    again = {f"layers.1.output_adapters.adapters.golden.{name}": torch.zeros(2) for name in ("adapter_up.bias", "x")}
    assert str(refused("llama/seq_bn", **again)) == "layers.1.output_adapters.adapters.golden: is stored twice, under two paths"
    key = "layers.1.self_attn.q_proj.loras.golden"
    assert str(refused("llama/lora", **{f"{key}.lora_A": torch.zeros(3, 32)})) == f"{key}: is stored twice, under two paths"


@pytest.mark.parametrize("path", ["model.layers.2", "model.layers.1.mlp", "encoder.layer.1", "model", "x.model.layers.1"])
def test_a_site_in_no_layer_is_named(path: str) -> None:
    key = f"{path}.output_adapters.adapters.golden"
    assert refused("llama/seq_bn", **{f"{key}.adapter_up.bias": torch.zeros(32)}).field == key


def test_a_site_that_the_config_leaves_out_is_named() -> None:
    key = "model.layers.0.attention_adapters.adapters.golden"
    assert "no config gives layer 0" in str(refused("llama/seq_bn", **{f"{key}.adapter_up.bias": torch.zeros(32)}))


def test_a_width_that_is_not_the_configs_is_named() -> None:
    error = refused("llama/seq_bn", **{f"{SITE}.adapter_down.0.weight": torch.zeros(5, 32)})
    assert str(error) == f"{SITE}.adapter_down.0.weight: has shape [5, 32], the base model needs [4, 32]"


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.gate_proj", "lm_head", "self_attn.k_proj"])
def test_a_lora_where_the_config_gives_none_is_named(module: str) -> None:
    key = f"model.layers.0.{module}.loras.golden"
    assert refused("llama/lora", **{f"{key}.lora_A": torch.zeros(3, 32)}).field == key


def test_a_missing_lora_is_named() -> None:
    gone = {f"model.layers.1.self_attn.v_proj.loras.golden.lora_{side}": None for side in "AB"}
    assert str(refused("llama/lora", **gone)).startswith("layer 1: has no LoRA at 'v'")


# --- Models the library hooks ----------------------------------------------------------------------------------------


def interfaced(**changes: object) -> dict[str, Any]:
    _, _, interface = files("qwen2/double_seq_bn")
    assert interface is not None
    return {**interface, "interface": {**interface["interface"], **changes}}


def test_qwen_is_read_without_its_interface_file() -> None:
    config, tensors, _ = files("qwen2/double_seq_bn")
    assert same(read_adapterhub(config, tensors, base_of("qwen2")), read("qwen2/double_seq_bn"))


def test_another_model_needs_its_interface_file() -> None:
    config, tensors, _ = files("llama/seq_bn")
    base = base_of("llama")
    unknown = BaseShape(**{**vars(base), "model_type": "granite"})
    asked = {**config, "model_type": "granite"}
    with pytest.raises(AdapterError, match=r"^adapter_interface\.json: is missing"):
        read_adapterhub(asked, tensors, unknown)
    assert same(read_adapterhub(asked, tensors, unknown, interfaced()), read("llama/seq_bn"))


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_ln_1": "post_attention_layernorm"},
        {"layer_output_proj": "mlp.gate_proj"},
        {"attn_o_proj": None},
        {"layer_self_attn": 3},
    ],
)
def test_an_interface_that_does_not_fit_the_base_is_named(changes: dict[str, object]) -> None:
    config, tensors, _ = files("qwen2/double_seq_bn")
    with pytest.raises(AdapterError, match=r"^adapter_interface\.json"):
        read_adapterhub(config, tensors, base_of("qwen2"), interfaced(**changes))


def test_a_residual_taken_elsewhere_is_refused_where_it_is_used() -> None:
    interface = interfaced(layer_pre_ffn="mlp", layer_pre_self_attn="self_attn")
    base = base_of("qwen2")
    config, tensors, _ = files("qwen2/double_seq_bn")
    assert same(read_adapterhub(config, tensors, base, interface), read("qwen2/double_seq_bn"))
    config, tensors, _ = files("qwen2/seq_bn")
    with pytest.raises(AdapterError, match=r"^adapter_interface\.json: takes the residual before mlp"):
        read_adapterhub(config, tensors, base, interface)


def test_dropping_the_residual_of_a_hooked_model_is_refused() -> None:
    config, tensors, interface = files("qwen2/seq_bn")
    config["config"]["original_ln_after"] = False
    with pytest.raises(AdapterError, match=r"^config\.original_ln_after"):
        read_adapterhub(config, tensors, base_of("qwen2"), interface)


def test_a_parallel_adapter_without_an_input_is_refused() -> None:
    config, tensors, interface = files("phi/seq_bn")
    config["config"]["is_parallel"] = True
    with pytest.raises(AdapterError, match=r"^config\.is_parallel"):
        read_adapterhub(config, tensors, base_of("phi"), interface)


def test_a_base_of_unknown_layout_takes_loras_but_no_bottlenecks() -> None:
    base = BaseShape(**{**vars(base_of("llama")), "sublayers": ()})
    config, tensors, _ = files("llama/seq_bn")
    with pytest.raises(AdapterError, match=r"^config\.architecture: bottlenecks are not served"):
        read_adapterhub(config, tensors, base)
    config, tensors, _ = files("llama/lora")
    assert same(read_adapterhub(config, tensors, base), read("llama/lora"))
