"""Runner: caches, changes and forward passes; a row's numbers depend on nobody else's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import pytest
import torch
from torch import Tensor

from adapters_store.digest import Digest
from server import host_memory
from server.engine.plan import Copy, Evict, Fill, Put, Row
from server.engine.plan import Sequence as Seq
from server.methods import build_methods
from server.methods.base import Adapter, BaseShape, Part, Prefix
from server.model.batch import BatchBuilder
from server.model.kernels import Kernels
from server.model.loader import make_base
from server.model.runner import CacheShape, Runner, block_nbytes
from server.requests import Request, Sampling, Token
from tests.lab import BASE, Lab
from tests.tiny import tiny_model

CPU = torch.device("cpu")
SIZE = 4
PROMPT = [5, 9, 33, 60, 12, 71, 8]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def new_runner(blocks: int = 32) -> Runner:
    base = make_base(tiny_model("llama"), BASE, CPU, torch.float32)
    return Runner(base, CacheShape(blocks, SIZE), build_methods(), Kernels("torch"))


def sequence(ids: Sequence[int], blocks: Sequence[int] = (3, 7, 5, 9), **sampling: object) -> Seq:
    params = Sampling(**{"max_new_tokens": 9, **sampling})  # type: ignore[arg-type]
    return Seq(Request("r", "t", (), tuple(ids), params), (), b"", 0, list(ids), len(ids), blocks=list(blocks))


def oracle(ids: Sequence[int]) -> Tensor:
    """Hugging Face's logits [T, V]."""
    model = tiny_model("llama")
    model.config._attn_implementation = "eager"
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def caches(runner: Runner) -> Tensor:
    """[layers, 2, blocks, block_size, kv_heads, head_dim]"""
    return torch.stack([torch.stack(caches) for caches in runner._caches])


# ---- sizes ----


def test_cache_bytes_are_those_of_the_tensors() -> None:
    runner = new_runner(blocks=11)
    shape = CacheShape(11, SIZE)
    assert shape.nbytes(runner.base) == caches(runner).nbytes
    assert shape.nbytes(runner.base) == 11 * block_nbytes(runner.base, SIZE)


# ---- forward passes ----


def test_prefill_in_chunks_and_decode_give_hugging_faces_tokens() -> None:
    runner, seq = new_runner(), sequence(PROMPT)
    assert runner.run([Row(seq, 0, 3)]) == {}  # a chunk that ends before the prompt does says nothing
    for start, count in ((3, 4), (7, 1), (8, 1)):
        sample = runner.run([Row(seq, start, count)])[seq]
        expected = oracle(seq.ids)[-1]
        assert sample.token is not None
        assert sample.token.id == int(expected.argmax())
        assert sample.token.logprob == pytest.approx(float(expected.log_softmax(-1).max()), abs=1e-4)
        seq.ids.append(sample.token.id)


def test_rows_of_all_kinds_share_a_step() -> None:
    runner = new_runner()
    running, joining, chunk = sequence(PROMPT, (3, 7)), sequence(PROMPT[::-1], (1, 2)), sequence(PROMPT * 2, (4, 6, 8, 10))
    runner.run([Row(running, 0, 6)])
    samples = runner.run([Row(chunk, 0, 5), Row(joining, 0, 7), Row(running, 6, 1)])
    assert samples.keys() == {joining, running}
    for seq in (joining, running):
        token = samples[seq].token
        assert token is not None
        assert token.id == int(oracle(seq.ids)[-1].argmax())


def test_the_null_block_stays_zero() -> None:
    runner = new_runner()
    runner.run([Row(sequence(PROMPT), 0, 7), Row(sequence(PROMPT, (1, 2)), 0, 1)])
    assert not caches(runner)[:, :, 0].any()
    assert caches(runner)[:, :, 3].any()


@pytest.mark.parametrize("budget", [3, 64])
def test_prompt_logprobs_are_those_of_the_whole_prompt_however_it_is_cut(budget: int) -> None:
    lab = Lab(tiny_model("llama"), {}, max_batch_tokens=budget)
    prompt = [*PROMPT, *PROMPT[::-1]]
    lab.submit("a", prompt, prompt_logprobs=True, max_new_tokens=3)
    lab.submit("b", PROMPT, max_new_tokens=3)
    lab.run()
    scored = [token for event in lab.events for token in event.prompt if event.request_id == "a"]
    expected = oracle(prompt).log_softmax(-1)
    assert [token.id for token in scored] == prompt
    assert scored[0] == Token(prompt[0], None)
    for position, token in enumerate(scored[1:]):
        assert token.logprob == pytest.approx(float(expected[position, token.id]), abs=1e-4)
    assert not [event for event in lab.events if event.request_id == "b" and event.prompt]


def test_prompt_logprobs_are_given_once_although_the_prompt_is_computed_again() -> None:
    lab = Lab(tiny_model("llama"), {}, blocks=9, max_batch_tokens=6)
    for name in "ab":
        lab.submit(name, PROMPT, prompt_logprobs=True, max_new_tokens=14)
    lab.run()
    assert lab.observer.preemptions > 0
    for name in "ab":
        scored = [token.id for event in lab.events if event.request_id == name for token in event.prompt]
        assert scored == PROMPT


# ---- changes ----


def test_copy_copies_one_block_in_every_layer() -> None:
    runner = new_runner()
    runner.run([Row(sequence(PROMPT), 0, 7)])
    runner.apply([Copy(3, 20)], {})
    held = caches(runner)
    assert torch.equal(held[:, :, 20], held[:, :, 3])
    assert not held[:, :, 21].any()


def test_fill_writes_a_prefix_and_nothing_behind_it() -> None:
    runner = new_runner()
    keys, values = random(2, 6, 2, 8), random(2, 6, 2, 8, seed=1)
    adapter = Adapter(Digest.of(b"p"), (Part("prefix_tuning", prefix=Prefix(6, keys, values)),))
    for cache in chain.from_iterable(runner._caches):
        cache[9] = torch.nan  # what the block's last owner left
    runner.apply([Put(adapter.digest, {}), Fill(adapter.digest, (4, 9))], {adapter.digest: adapter})
    held = caches(runner)[:, :, [4, 9]].flatten(2, 3)
    assert torch.equal(held[:, 0, :6], keys)
    assert torch.equal(held[:, 1, :6], values)
    assert not held[:, :, 6:].any()


@pytest.mark.parametrize(("blocks", "tokens", "written"), [(32, 37, 10), (4, 37, 3)])
def test_warming_up_runs_as_many_tokens_as_asked_or_fit(
    blocks: int, tokens: int, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "_madvise", None)
    monkeypatch.setattr(host_memory, "taken", lambda written, large_pages: written)
    runner, ran = new_runner(blocks), []
    run = runner.run
    monkeypatch.setattr(runner, "run", lambda rows: ran.extend(row.count for row in rows) or run(rows))
    size = caches(runner).shape[3]
    assert runner.warm_up(tokens) == (1 + written) * block_nbytes(runner.base, size)  # the null block lies before them
    assert ran == [min(tokens, written * size)]
    assert not caches(runner)[:, :, 0].any()


def reached(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks up to the highest that is about to be written, each time; that many were reached for before any was written."""
    seen: list[int] = []

    def reach(written: int) -> None:
        seen.append(written // runner._caches[0][0][0].nbytes)
        assert not caches(runner)[:, :, seen[-1] - 1].any()

    monkeypatch.setattr(runner._ahead, "reach", reach)
    return seen


def test_memory_is_reached_for_before_a_step_a_prefix_or_a_warm_up_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = new_runner()
    seen = reached(runner, monkeypatch)
    runner.run([Row(sequence([1, 2, 3], (3,)), 0, 3), Row(sequence([4, 5], (6,)), 0, 2)])
    keys = torch.randn(2, 6, 2, 8)
    adapter = Adapter(Digest.of(b"p"), (Part("prefix_tuning", prefix=Prefix(6, keys, keys)),))
    runner.apply([Put(adapter.digest, {}), Fill(adapter.digest, (9, 12))], {adapter.digest: adapter})
    runner.warm_up(15 * SIZE)
    assert seen == [7, 13, 16]


def test_quiet_moments_take_memory_until_there_is_none_left_to_take() -> None:
    runner = new_runner()
    while runner.prepare():
        pass
    assert runner.warm_up(SIZE) == caches(runner).nbytes


def test_adapter_bytes_are_pools_and_prefixes_until_they_leave() -> None:
    runner = new_runner()
    prefix = Prefix(3, keys=random(2, 3, 2, 8), values=random(2, 3, 2, 8))
    adapter = Adapter(Digest.of(b"p"), (Part("prefix_tuning", prefix=prefix),))
    assert runner.adapter_bytes == 0
    runner.apply([Put(adapter.digest, {})], {adapter.digest: adapter})
    assert runner.adapter_bytes == prefix.nbytes
    runner.apply([Evict(adapter.digest, {})], {})
    assert runner.adapter_bytes == 0


def test_fill_refuses_embeddings_and_an_unknown_adapter() -> None:
    runner = new_runner()
    adapter = Adapter(Digest.of(b"s"), (Part("prompt_tuning", prefix=Prefix(2, embeddings=random(2, 32))),))
    runner.apply([Put(adapter.digest, {})], {adapter.digest: adapter})
    with pytest.raises(ValueError, match="has no K/V"):
        runner.apply([Fill(adapter.digest, (4,))], {})
    with pytest.raises(KeyError):
        runner.apply([Fill(BASE, (4,))], {})


def test_evict_takes_hooks_and_prefix_away() -> None:
    runner = new_runner()
    adapter = bias(b"x", runner.base.shape, 1.0)
    adapter = Adapter(adapter.digest, (*adapter.parts, Part("prefix_tuning", prefix=Prefix(1, *random(2, 2, 1, 2, 8)))))
    runner.apply([Put(adapter.digest, {"bitfit": 1})], {adapter.digest: adapter})
    assert runner.sites.attached
    runner.apply([Evict(adapter.digest, {"bitfit": 1})], {})
    assert runner.sites.attached == ()
    with pytest.raises(KeyError):
        runner.apply([Fill(adapter.digest, (4,))], {})


# ---- slots that change hands ----


def bias(name: bytes, shape: BaseShape, scale: float) -> Adapter:
    """A BitFit adapter: several of them in a step have their vectors gathered and kept with the composition."""
    digest = Digest.of(name)
    seed = sum(name)
    linear = [n for n, m in shape.modules.items() if m.kind == "linear" and "." in n]
    sites = {n: {"delta": random(shape.modules[n].out_features, seed=seed + i) * scale} for i, n in enumerate(linear)}
    return Adapter(digest, (Part("bitfit", "bitfit", sites),))


@pytest.fixture(scope="module")
def biases() -> dict[str, Adapter]:
    shape = make_base(tiny_model("llama"), BASE, CPU, torch.float32).shape
    return {name: bias(name.encode(), shape, 0.5) for name in "abcd"}


def alone(adapters: Mapping[str, Adapter], name: str) -> list[int]:
    lab = Lab(tiny_model("llama"), {adapters[name].digest: adapters[name]})
    lab.submit(name, [7], adapters[name].digest, max_new_tokens=8)
    lab.run()
    return lab.tokens(name)


def reused(adapters: Mapping[str, Adapter]) -> dict[str, list[int]]:
    """a and b run in slots 1 and 2, then c and d in the same two, with the very same composition of the step."""
    lab = Lab(tiny_model("llama"), {adapter.digest: adapter for adapter in adapters.values()}, slots=2)
    for pair in ("ab", "cd"):
        for name in pair:
            lab.submit(name, [7], adapters[name].digest, max_new_tokens=8)
        lab.run()
    assert lab.observer.evictions == 2
    return {name: lab.tokens(name) for name in adapters}


def test_a_reused_slot_is_gathered_anew_though_the_composition_is_the_same(biases: dict[str, Adapter]) -> None:
    expected = {name: alone(biases, name) for name in biases}
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    assert reused(biases) == expected


def test_the_test_above_notices_a_stale_gather(biases: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchBuilder, "forget_slots", lambda self, slots: None)
    found = reused(biases)
    assert found["c"] != alone(biases, "c")
