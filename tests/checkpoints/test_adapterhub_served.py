"""What AdapterHub's library computed, against the engine: every golden adapter of a base in one batch, prefixes included."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods.base import Adapter, Limits
from server.methods.read import read_adapter
from tests.checkpoints.golden import MODELS, base_of, build, cases, expectations, upload
from tests.lab import Lab

LIMITS = Limits()


def adapter_of(kind: str, case: str) -> Adapter:
    digest = Digest.of(f"{kind}/{case}".encode())
    return read_adapter(upload(kind, case), base_of(case.partition("/")[0]), LIMITS, digest)


def lab_of(model: str, adapters: Mapping[str, Adapter], **changes: Any) -> Lab:
    settings = {"blocks": 1500, "slots": 128, "max_running": 128, "max_batch_tokens": 64, **changes}
    return Lab(copy.deepcopy(build(model)), {adapter.digest: adapter for adapter in adapters.values()}, **settings)


def prompt() -> list[int]:
    return expectations()["ids"][0].tolist()


def check(lab: Lab, id: str, case: str) -> None:
    """Equal greedy tokens, and the logits behind the first of them."""
    expected = expectations()
    assert lab.tokens(id) == expected[f"{case}/tokens"][0].tolist()
    assert torch.allclose(lab.logits(id)[0], expected[f"{case}/logits"][0, -1], atol=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_all_adapters_of_a_base_in_one_batch_compute_what_the_library_computes(model: str) -> None:
    adapters = {case: adapter_of("cases", case) for case in cases("cases") if case.startswith(f"{model}/")}
    lab = lab_of(model, adapters)
    for case, adapter in adapters.items():
        lab.submit(case, prompt(), adapter.digest)
    lab.submit(model, prompt())
    lab.run()
    for id in (*adapters, model):
        check(lab, id, id)
    assert max(lab.observer.adapters_per_step) > len(adapters) // 2


PREFIXED = [case for case in cases("cases") if "prefix" in case or case.endswith("mam")]


@pytest.mark.parametrize("case", PREFIXED)
def test_a_prefix_takes_blocks_but_no_positions(case: str) -> None:
    prefix = adapter_of("cases", case).prefix
    assert prefix is not None
    assert prefix.shift == prefix.length > 0


def test_preempted_rows_keep_the_positions_of_their_text() -> None:
    """So few blocks that rows are recomputed; a tenant each, so that none is found in the prefix cache."""
    case = "llama/prefix"
    adapter = adapter_of("cases", case)
    lab = lab_of("llama", {case: adapter}, blocks=18, block_size=4)
    for id in "abcd":
        lab.submit(id, prompt(), adapter.digest, tenant=id)
    lab.run()
    assert lab.observer.preemptions > 0
    for id in "abcd":
        check(lab, id, case)


def test_a_prompt_found_in_the_prefix_cache_is_at_the_same_positions() -> None:
    case = "llama/union_with_prefix"
    adapter = adapter_of("cases", case)
    lab = lab_of("llama", {case: adapter}, block_size=2)
    for id in ("first", "again"):
        lab.submit(id, prompt(), adapter.digest)
        lab.run()
        check(lab, id, case)
    assert any(event.cached_tokens for event in lab.events if event.request_id == "again")


def test_a_long_prompt_in_chunks_is_at_the_same_positions() -> None:
    case = "gpt2/prefix"
    lab = lab_of("gpt2", {case: adapter_of("cases", case)}, max_batch_tokens=3)
    lab.submit("a", prompt(), *lab.adapters)
    lab.run()
    check(lab, "a", case)


REFUSED = {
    "llama/prefix_leave_out": "config.leave_out",
    "llama/prefix_gates": "config.use_gating",
    "llama/bottleneck_gates": "config.use_gating",
    "llama/lora_gates": "config.use_gating",
    "llama/ia3_gates": "config.use_gating",
    "llama/compacter": "config.phm_layer",
    "llama/invertible": "config.inv_adapter",
    "llama/reft": "config.architecture",
    "llama/mtl_lora": "config.architecture",
    "gpt2/dora": "config.use_dora",
    "gpt2/vera": "config.vera_d",
}


def test_what_the_library_saves_and_nothing_serves_is_all_known() -> None:
    assert REFUSED.keys() == set(cases("refused"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_the_field_that_asks_for_it(case: str) -> None:
    with pytest.raises(AdapterError) as refusal:
        adapter_of("refused", case)
    assert refusal.value.field == REFUSED[case]


HEADS = [case for case in cases("heads") if f"heads/{case}/scores" in expectations()]
REFUSED_HEADS = {
    "llama/multilabel": "head_config.json: config.head_type",
    "llama/question_answering": "head_config.json: config.head_type",
    "llama/three_layers": "head_config.json: config.layers",
    "llama/causal_lm_deep": "head_config.json: config.layers",
}


@pytest.mark.parametrize("case", REFUSED_HEADS)
def test_a_head_that_is_not_served_is_refused_by_name(case: str) -> None:
    with pytest.raises(AdapterError) as refusal:
        adapter_of("heads", case)
    assert refusal.value.field == REFUSED_HEADS[case]


@pytest.mark.parametrize("model", sorted({case.partition("/")[0] for case in HEADS}))
def test_the_heads_of_a_base_score_what_the_library_scores(model: str) -> None:
    served = [case for case in HEADS if case.startswith(f"{model}/") and case not in REFUSED_HEADS]
    adapters = {case: adapter_of("heads", case) for case in served}
    lab = lab_of(model, adapters)
    for case, adapter in adapters.items():
        assert {part.method for part in adapter.parts} == {"bottleneck", "head"}
        lab.ask("classify", case, prompt(), adapter.digest)
    lab.run()
    for case in adapters:
        assert torch.allclose(lab.scores(case), _rows(case), atol=1e-3), case


def _rows(case: str) -> Tensor:
    """[1, k] of a classification, [T, k] of a tagging."""
    scores = expectations()[f"heads/{case}/scores"]
    return scores if scores.ndim == 2 else scores[None]


def test_an_output_head_of_its_own_is_served_and_the_bases_own_is_no_part() -> None:
    own, same = adapter_of("heads", "llama/causal_lm"), adapter_of("heads", "mistral/static_causal_lm")
    assert {part.method for part in own.parts} == {"bottleneck", "full", "bitfit"}
    assert {part.method for part in same.parts} == {"bottleneck"}
    for case, adapter in (("llama/causal_lm", own), ("mistral/static_causal_lm", same)):
        lab = lab_of(case.partition("/")[0], {case: adapter})
        lab.submit("a", prompt(), adapter.digest)
        lab.run()
        check(lab, "a", f"heads/{case}")
