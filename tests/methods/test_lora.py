"""LoRA: PEFT's own logits for every variant that is served, and every path of the op against the plain loop."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from server.errors import AdapterError
from server.methods import METHODS, build_methods
from server.methods.base import Checkpoint, Limits
from server.methods.grouped import lora_loop, rows_of
from server.methods.lora import LoraOp, bucket_of

CPU = torch.device("cpu")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = {
    "llama, every linear": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": LINEARS}),
    "qwen2, biases in the base": ("qwen2", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}),
    "gpt2, Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt_neox": ("gpt_neox", {"r": 4, "target_modules": ["query_key_value", "dense", "dense_4h_to_h"], "bias": "all"}),
    "opt": ("opt", {"r": 4, "target_modules": ["q_proj", "fc1", "fc2"], "bias": "all"}),
    "gemma": ("gemma", {"r": 4, "target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "rsLoRA": ("llama", {"r": 9, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}),
    "rank pattern": ("llama", {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9}}),
    "rank pattern as a regular expression": ("llama", {"r": 4, "rank_pattern": {r".*\.0\..*q_proj": 2}}),
    "embedding": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding that is scaled": ("gemma", {"r": 4, "target_modules": ["embed_tokens"]}),
    "embedding and head that share a weight": (
        "gemma",
        {"r": 4, "target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "embedding and Conv1D": ("gpt2", {"r": 12, "use_rslora": True, "target_modules": ["wte", "c_attn"]}),
    "output head": ("llama", {"r": 4, "lora_alpha": 12, "target_modules": ["lm_head", "embed_tokens"]}),
    "head that shares the embedding's weight": ("gpt2", {"r": 4, "target_modules": ["lm_head"]}),
    "every linear by its short name": ("qwen2", {"r": 4, "target_modules": "all-linear"}),
    "target as a regular expression": ("llama", {"r": 4, "target_modules": r".*\.[01]\.(self_attn|mlp)\.(q|up)_proj"}),
    "exclude": ("llama", {"r": 4, "target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}),
    "layers of a pattern": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "h"}),
    "alternatives and classes in patterns": (
        "llama",
        {"r": 4, "rank_pattern": {r"[0-9]\.(mlp|x)\.\w+": 9, "^q_proj": 7}, "alpha_pattern": {r"(.|..)+1(.)*q_proj|zz": 3}},
    ),
    "alpha pattern": ("llama", {"r": 4, "alpha_pattern": {r"^model.layers.0.self_attn\.q_proj": 2, "q_proj": 64}}),
    "some layers": ("llama", {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "lora_bias": ("qwen2", {"r": 4, "lora_alpha": 12, "lora_bias": True, "target_modules": ["q_proj"]}),
    "bias lora_only": ("qwen2", {"r": 4, "bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}),
    "bias all, Conv1D and norms": ("gpt2", {"r": 4, "bias": "all", "target_modules": ["c_attn"], "lora_bias": True}),
    "orthogonal init": ("llama", {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["v_proj"]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_lora_gives_pefts_logits(variant, trained, hooked, ids):
    name, fields = VARIANTS[variant]
    adapter = trained(name, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "up_proj"]} | fields))
    served = hooked(name)
    parts = adapter.parts()
    for part in parts:
        served.put(part, 2)
    slots = {part.pool: [2, 0, 2] for part in parts}

    logits, alone = served.logits(ids, slots), served.logits(ids, {})

    expected = adapter.logits(ids)
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1], alone[1], atol=1e-6, rtol=0)
    assert (expected - alone).abs().max() > 0.05


def test_adapters_of_different_rank_and_family_share_a_batch(trained, hooked, ids):
    loras = [trained("llama", LoraConfig(r=r, target_modules=["q_proj"])) for r in (4, 12, 8)]
    served = hooked("llama")
    pools = [adapter.parts()[0].pool for adapter in loras]
    for slot, adapter in enumerate(loras, start=1):
        served.put(adapter.parts()[0], slot)

    logits = served.logits(ids, {"lora:8": [1, 0, 3], "lora:16": [0, 2, 0]})

    assert pools == ["lora:8", "lora:16", "lora:8"]
    for row, adapter in enumerate(loras):
        torch.testing.assert_close(logits[row], adapter.logits(ids)[row], atol=1e-4, rtol=1e-4)


# --- the op against the loop --------------------------------------------------------------------------------------

PATTERNS = {
    "distinct": [1, 2, 3, 4, 5, 6, 7],
    "distinct, slots with gaps": [1, 3, 5, 7],
    "uniform": [1, 1, 2, 2, 3, 3, 4, 4],
    "skewed": [1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3],
    "identical": [5] * 9,
    "one": [3],
    "prefill beside decode": [1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
    "scattered": [7, 0, 1, 0, 1, 2, 2, 0, 2, 2, 2, 5, 0, 7],
    "nobody": [0, 0, 0],
}


def _op(rank: int, in_features: int, out_features: int, slots: int = 8, dtype: torch.dtype = torch.float32) -> LoraOp:
    torch.manual_seed(0)
    op = LoraOp(rank, in_features, out_features, CPU, dtype)
    op.grow(slots)
    for slot in range(1, slots):
        own = 1 + slot % rank
        op.put(slot, {"A": torch.randn(own, in_features), "B": torch.randn(out_features, own)})
    return op


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_path_equals_the_loop(pattern, dtype):
    slots = PATTERNS[pattern]
    op, rows = _op(8, 6, 5, dtype=dtype), rows_of(slots)
    x, y = torch.randn(len(slots), 6), torch.randn(len(slots), 5)
    expected = y.clone()
    lora_loop(x, expected, op.a.tensor.float(), op.b.tensor.float(), rows)

    first, again = op.after(x, y.clone(), rows), op.after(x, y.clone(), rows)

    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, first, atol=0, rtol=0)
    untouched = [token for token, slot in enumerate(slots) if not slot]
    assert torch.equal(first[untouched], y[untouched])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nan_in_one_slot_reaches_only_its_own_rows(pattern):
    slots = PATTERNS[pattern]
    sick = max(slots)
    op, rows = _op(8, 6, 5), rows_of(slots)
    if sick:
        op.put(sick, {"A": torch.full((2, 6), math.nan), "B": torch.full((5, 2), math.nan), "bias": torch.full((5,), math.nan)})

    y = op.after(torch.randn(len(slots), 6), torch.randn(len(slots), 5), rows)

    assert [bool(row.isnan().any()) for row in y] == [bool(slot) and slot == sick for slot in slots]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_adapters_that_do_not_name_the_module_pass_it_unchanged(pattern):
    slots = PATTERNS[pattern]
    op, rows = LoraOp(8, 6, 5, CPU, torch.float32), rows_of(slots)
    op.grow(3)  # the other slots of the pool lie past the end of this module's
    for slot in (1, 2):
        op.put(slot, {"A": torch.randn(2, 6), "B": torch.randn(5, 2)})
    x, y = torch.randn(len(slots), 6), torch.randn(len(slots), 5)
    expected = y.clone()
    lora_loop(x, expected, op.a.tensor, op.b.tensor, rows_of([slot if slot < 3 else 0 for slot in slots]))

    for _ in range(2):
        torch.testing.assert_close(op.after(x, y.clone(), rows), expected, atol=1e-5, rtol=1e-5)


def test_a_kernel_never_sees_a_slot_that_the_module_does_not_hold():
    seen = []

    def kernel(a, b, rows):
        return lambda x, y: seen.append((rows.index.tolist(), rows.groups))

    op = LoraOp(8, 6, 5, CPU, torch.float32, kernel)
    op.grow(2)
    op.put(1, {"A": torch.randn(2, 6), "B": torch.randn(5, 2)})
    for slots in ([7, 1, 1], [7, 7], [0, 1]):
        op.after(torch.randn(len(slots), 6), torch.randn(len(slots), 5), rows_of(slots))
    assert seen == [([1, 2], ((1, 0, 2),)), ([1], ((1, 0, 1),))]


def test_a_modules_own_rows_know_where_prompts_begin():
    """Which kernel a row is for must not depend on who else is in the step."""
    seen = []

    def kernel(a, b, rows):
        seen.append(rows.prompt)
        return lambda x, y: None

    op = LoraOp(8, 6, 5, CPU, torch.float32, kernel)
    op.grow(2)
    op.put(1, {"A": torch.randn(2, 6), "B": torch.randn(5, 2)})
    for slots in ([1, 1, 1], [7, 1, 1]):
        op.after(torch.randn(3, 6), torch.randn(3, 5), replace(rows_of(slots), prompt=2))
    assert seen == [2, 2]


def test_a_slot_that_was_cleared_or_reused_keeps_nothing_of_its_last_adapter():
    op, rows = _op(8, 6, 5), rows_of([1, 1])
    x, y = torch.randn(2, 6), torch.randn(2, 5)
    op.put(1, {"A": torch.randn(8, 6), "B": torch.randn(5, 8), "bias": torch.randn(5)})
    a, b = torch.randn(2, 6), torch.randn(5, 2)

    op.put(1, {"A": a, "B": b})
    torch.testing.assert_close(op.after(x, y.clone(), rows), y + x @ a.T @ b.T)
    op.clear(1)
    assert torch.equal(op.after(x, y.clone(), rows), y)


def test_growing_keeps_the_slots_and_at_least_doubles():
    op = _op(8, 6, 5, slots=3)
    before = op.a.tensor.clone(), op.b.tensor.clone()

    op.grow(4)

    assert len(op.a.tensor) == len(op.b.tensor) == 6
    assert torch.equal(op.a.tensor[:3], before[0])
    assert torch.equal(op.b.tensor[:3], before[1])
    assert op.nbytes == 4 * 6 * (8 * 6 + 5 * 8)


def test_a_kernel_takes_the_place_of_the_torch_arithmetic_and_is_made_once_per_composition():
    made, calls = [], []

    def kernel(a, b, rows):
        made.append(rows)
        return lambda x, y: calls.append((x, y))

    part = METHODS["lora"].read(_checkpoint(), _base(), Limits())
    op = build_methods(kernel)["lora"].op(part, "layer.q", _base(), CPU, torch.float32)
    op.grow(2)
    op.put(1, {**part.sites["layer.q"], "bias": torch.ones(5)})
    x, y, rows = torch.randn(2, 6), torch.zeros(2, 5), rows_of([1, 1])

    out = op.after(x, y, rows).clone()
    op.after(x, y, rows)

    assert [rows] == made
    assert [(given is x, written is y) for given, written in calls] == [(True, True)] * 2
    assert torch.equal(out, torch.ones(2, 5))


# --- reading ------------------------------------------------------------------------------------------------------


def _base():
    from adapters_store.digest import Digest
    from server.methods.base import BaseShape, ModuleShape

    modules = {"layer.q": ModuleShape("linear", 6, 5), "layer.e": ModuleShape("embedding", 9, 6)}
    modules |= {"lm_head": ModuleShape("linear", 6, 9), "layer.n": ModuleShape("norm", 6, 6)}
    modules["layer.p"] = ModuleShape("embedding", 9, 6, gain=None)
    weights = {"layer.q": torch.arange(30.0).view(5, 6) / 7}
    return BaseShape(Digest("0" * 64), "tiny", 6, 1, 2, 2, 3, 9, 32, modules, weight=weights.__getitem__)


def _checkpoint(module="layer.q", a=(2, 6), b=(5, 2), scale=2.0, **more):
    tensors = {"A": torch.ones(a), "B": torch.ones(b or ()), **more}
    return Checkpoint("lora", {"scale": {module: scale}}, {module: {k: v for k, v in tensors.items() if v is not None}})


def test_the_scale_is_folded_into_b_and_the_bias_in_fp32():
    checkpoint = _checkpoint(bias=torch.full((5,), 3.0, dtype=torch.bfloat16), scale=1 / 3)

    site = METHODS["lora"].read(checkpoint, _base(), Limits()).sites["layer.q"]

    assert torch.equal(site["A"], torch.ones(2, 6))
    assert torch.equal(site["B"], torch.full((5, 2), 1 / 3))
    assert torch.equal(site["bias"], torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_of_the_bases_weight_may_be_rounded_to_its_own_dtype(dtype):
    copy = _base().weight("layer.q").to(dtype)
    assert METHODS["lora"].read(_checkpoint(base=copy), _base(), Limits()).sites["layer.q"].keys() == {"A", "B"}


@pytest.mark.parametrize(("rank", "bucket"), [(1, 8), (8, 8), (9, 16), (16, 16), (33, 64), (256, 256)])
def test_the_pool_is_the_next_power_of_two(rank, bucket):
    assert bucket_of(rank) == bucket
    assert METHODS["lora"].read(_checkpoint(a=(rank, 6), b=(5, rank)), _base(), Limits()).pool == f"lora:{bucket}:bf16"  # ones


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (_checkpoint(b=None, B=None), "layer.q.lora_B: is missing although lora_A is there"),
        (_checkpoint(A=None), "layer.q.lora_A: is missing although lora_B is there"),
        (_checkpoint(a=(2, 7)), r"layer.q.lora_A: has shape \[2, 7\], the base model needs \[2, 6\]"),
        (_checkpoint(b=(5, 3)), r"layer.q.lora_B: has shape \[5, 3\], the base model needs \[5, 2\]"),
        (_checkpoint(a=(2,)), "layer.q.lora_A: has 1 dimensions"),
        (_checkpoint(a=(65, 6), b=(5, 65)), "rank 65 is over this server's limit of 64"),
        (_checkpoint(bias=torch.ones(4)), r"layer.q.lora_B.bias: has shape \[4\]"),
        (_checkpoint(scale=1e39), "layer.q.lora_B: overflows when multiplied by the LoRA scale"),
        (_checkpoint("layer.k"), "has no module 'layer.k'"),
        (_checkpoint("layer.e"), r"layer.e.lora_A: has shape \[2, 6\], the base model needs \[2, 9\]"),
        (_checkpoint("layer.e", bias=torch.ones(6)), "layer.e.lora_A: the embedding 'layer.e' cannot have a LoRA bias"),
        (_checkpoint("layer.p"), "layer.p.lora_A: the embedding 'layer.p' cannot have LoRA, for it is not a plain table"),
        (_checkpoint("layer.n"), "'layer.n' is a module of kind norm"),
        (_checkpoint("lm_head"), r"lm_head.lora_B: has shape \[5, 2\], the base model needs \[9, 2\]"),
        (_checkpoint(base=torch.ones(6, 5)), r"layer.q.base_layer.weight: has shape \[6, 5\], the base model needs \[5, 6\]"),
        (_checkpoint(base=torch.ones(5, 6)), "layer.q.base_layer.weight: differs from the base model's"),
        (Checkpoint("lora", {"scale": {}}), "the upload holds no LoRA tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(checkpoint, message):
    with pytest.raises(AdapterError, match=message):
        METHODS["lora"].read(checkpoint, _base(), Limits(max_rank=64))


# --- how weights are held -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scale", "pool"),
    [
        (torch.bfloat16, 2.0, "lora:8:bf16"),
        (torch.bfloat16, 0.3, "lora:8"),  # folding 0.3 in would round
        (torch.float32, 2.0, "lora:8"),
    ],
)
def test_weights_are_held_in_bf16_only_where_that_loses_nothing(dtype, scale, pool, base_of):
    base, module = base_of("llama"), "model.layers.0.self_attn.q_proj"
    torch.manual_seed(3)
    site = {"A": torch.randn(4, 32).to(dtype), "B": torch.randn(32, 4).to(dtype)}
    part = METHODS["lora"].read(Checkpoint("lora", {"scale": {module: scale}}, {module: site}), base, Limits())
    op = METHODS["lora"].op(part, module, base, CPU, torch.float32)
    op.grow(2)
    op.put(1, part.sites[module])
    x = torch.randn(3, 32)

    got = op.after(x, torch.zeros(3, 32), rows_of([1, 1, 1]))

    assert part.pool == pool
    expected = x @ site["A"].float().T @ (site["B"].float() * scale).T
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
