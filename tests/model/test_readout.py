"""Readout against PEFT's own classifiers: chunked, from the prefix cache, among generations, and beside a broken head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from adapters_store.digest import Digest
from server.engine.plan import Row, Sample, Sequence
from server.methods.base import Adapter, Head, Part
from server.requests import FinishReason
from tests.classifiers import Classifier
from tests.lab import Lab
from tests.tiny import tiny_model

PROMPT = [5, 9, 13, 40, 41, 42, 43, 7, 66, 3, 21, 90, 55, 54, 53, 52, 8, 31, 30, 29, 28, 27, 26, 6]
CONFIGS: Mapping[str, Callable[[Any], peft.PeftConfig]] = {
    "lora": lambda task: peft.LoraConfig(task_type=task, r=4, lora_alpha=8),
    "ia3": lambda task: peft.IA3Config(task_type=task),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5),
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=5),
    "p_tuning": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=5, encoder_hidden_size=16),
}


def linear_head(task: str = "SEQ_CLS", pooling: str = "last", labels: int = 3, seed: int = 1) -> Head:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "score.weight": torch.randn(labels, 32, generator=generator),
        "score.bias": torch.randn(labels, generator=generator),
    }
    return Head(task, pooling, tuple(map(str, range(labels))), tensors)  # type: ignore[arg-type]


def alone(head: Head, name: str = "head") -> Adapter:
    """An adapter that is nothing but a head."""
    return Adapter(Digest.of(name.encode()), (Part("head", "head", head=head),))


def hidden_states(architecture: str, prompt: list[int]) -> Tensor:
    """[T, 32] after the final norm, from the model itself."""
    with torch.no_grad():
        states: Tensor = tiny_model(architecture).base_model(torch.tensor([prompt])).last_hidden_state[0]
    return states


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_logits_are_pefts(architecture: str, method: str, task: str, tmp_path: Path) -> None:
    classifier = Classifier(architecture, CONFIGS[method](task), tmp_path)
    lab = Lab(tiny_model(architecture), {}, max_batch_tokens=7)
    adapter = classifier.adapter(lab.runner.base.shape)
    lab.adapters[adapter.digest] = adapter
    for id in ("first", "again"):  # the second may find the first one's blocks
        lab.ask("classify", id, PROMPT, adapter.digest)
        lab.run()
        want = classifier.logits(PROMPT)
        assert want.std() > 0.1
        torch.testing.assert_close(lab.scores(id), want, atol=1e-3, rtol=0)
    assert (lab.ending("again").cached_tokens > 0) is (task == "SEQ_CLS")


def test_a_mean_is_over_the_texts_own_tokens_and_all_of_them(tmp_path: Path) -> None:
    head = linear_head(pooling="mean")
    lab = Lab(tiny_model("llama"), {}, max_batch_tokens=5)
    lab.adapters = {alone(head).digest: alone(head)}
    states = hidden_states("llama", PROMPT)
    want = head.tensors["score.weight"] @ states.mean(0) + head.tensors["score.bias"]
    lab.submit("generated", PROMPT, alone(head).digest)  # leaves its blocks in the prefix cache
    lab.run()
    for id in ("one", "two"):
        lab.ask("classify", id, PROMPT, alone(head).digest)
        lab.run()
        torch.testing.assert_close(lab.scores(id), want[None], atol=1e-3, rtol=0)
        assert lab.ending(id).cached_tokens == 0


def test_virtual_positions_are_no_part_of_a_mean(tmp_path: Path) -> None:
    classifier = Classifier("llama", CONFIGS["prefix"]("TOKEN_CLS"), tmp_path)
    lab = Lab(tiny_model("llama"), {}, max_batch_tokens=5)
    adapter = classifier.adapter(lab.runner.base.shape)
    assert adapter.head is not None
    mean = replace(adapter.head, task="SEQ_CLS", pooling="mean")
    parts = [replace(part, head=mean) if part.head else part for part in adapter.parts]
    lab.adapters = {adapter.digest: Adapter(adapter.digest, tuple(parts))}
    lab.ask("classify", "a", PROMPT, adapter.digest)
    lab.run()
    # The head is linear, so the mean of the tokens' logits is the logits of their mean.
    torch.testing.assert_close(lab.scores("a")[0], classifier.logits(PROMPT).mean(0), atol=1e-3, rtol=0)


def test_embeddings_are_the_final_hidden_states_pooled() -> None:
    lab = Lab(tiny_model("qwen2"), {}, max_batch_tokens=9)
    lab.ask("embed", "mean", PROMPT)
    lab.ask("embed", "last", PROMPT, pooling="last")
    lab.run()
    states = hidden_states("qwen2", PROMPT)
    torch.testing.assert_close(lab.scores("mean")[0], states.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(lab.scores("last")[0], states[-1], atol=1e-3, rtol=0)


def test_a_multi_layer_head_is_dense_activation_score() -> None:
    generator = torch.Generator().manual_seed(4)
    shapes = {"dense.weight": (16, 32), "dense.bias": (16,), "score.weight": (3, 16)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    head = Head("SEQ_CLS", "last", ("a", "b", "c"), tensors, "tanh")
    lab = Lab(tiny_model("gpt2"), {alone(head).digest: alone(head)})
    lab.ask("classify", "a", PROMPT, alone(head).digest)
    lab.run()
    state = hidden_states("gpt2", PROMPT)[-1]
    want = tensors["score.weight"] @ torch.tanh(tensors["dense.weight"] @ state + tensors["dense.bias"])
    torch.testing.assert_close(lab.scores("a")[0], want, atol=1e-3, rtol=0)


def test_choices_are_scored_as_the_next_token() -> None:
    lab = Lab(tiny_model("llama"), {}, max_batch_tokens=7)
    lab.submit("generated", PROMPT)
    lab.ask("score", "scored", PROMPT, choices=(4, 90, 4))
    lab.run()
    want = lab.logits("generated")[0].log_softmax(-1)[[4, 90, 4]]
    torch.testing.assert_close(lab.scores("scored"), want[None], atol=1e-5, rtol=0)


def many(lab: Lab) -> None:
    """Six heads of two tenants, embeddings, choices and generations, all at once."""
    for n in range(6):
        task, pooling = ("TOKEN_CLS", "last") if n % 3 == 0 else ("SEQ_CLS", ("last", "mean")[n % 2])
        adapter = alone(linear_head(task, pooling, labels=2 + n, seed=n), f"h{n}")
        lab.adapters[adapter.digest] = adapter
    digests = list(lab.adapters)
    for n in range(12):
        prompt = [3 + (7 * n + k) % 90 for k in range(5 + 3 * n)]
        lab.submit(f"g{n}", prompt, digests[n % 6], tenant=f"t{n % 2}", max_new_tokens=20)
        lab.ask("classify", f"c{n}", prompt, digests[n % 6], tenant=f"t{n % 2}")
        lab.ask("embed", f"e{n}", prompt, pooling=("last", "mean")[n % 2])
        lab.ask("score", f"s{n}", prompt, choices=(1, 2, 3))


def test_batch_mates_preemption_and_chunking_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Lab(tiny_model("llama"), {}, blocks=40, max_batch_tokens=11)
    many(crowd)
    preempted, preempt = [], crowd.scheduler._preempt

    def noting(sequence: Sequence) -> None:
        if sequence.request is not None:
            preempted.append((sequence.request.task, sequence.done))
        preempt(sequence)

    monkeypatch.setattr(crowd.scheduler, "_preempt", noting)
    crowd.run()
    assert any(done for task, done in preempted if task == "classify")  # some had a part of their scores
    assert max(crowd.observer.adapters_per_step) > 1
    single = Lab(tiny_model("llama"), {}, max_batch_tokens=64)
    many(single)
    single.run()
    for n in range(12):
        for kind in "ces":
            torch.testing.assert_close(crowd.scores(f"{kind}{n}"), single.scores(f"{kind}{n}"), atol=1e-4, rtol=0)
        assert crowd.tokens(f"g{n}") == single.tokens(f"g{n}")


def test_a_head_of_nan_fails_its_own_request_alone() -> None:
    good, bad = linear_head(), linear_head()
    broken = replace(bad, tensors={**bad.tensors, "score.bias": torch.tensor([0.0, float("nan"), 0.0])})
    lab = Lab(tiny_model("llama"), {})
    lab.adapters = {a.digest: a for a in (alone(good, "good"), alone(broken, "bad"))}
    for name in ("good", "bad"):
        lab.ask("classify", name, PROMPT, Digest.of(name.encode()))
    lab.submit("mate", PROMPT)
    lab.run()
    assert "not finite" in str(lab.ending("bad").error)
    assert lab.ending("good").finish is FinishReason.SCORED
    assert lab.finished("mate")


def test_without_a_head_only_the_request_fails() -> None:
    lab = Lab(tiny_model("llama"), {})
    lab.ask("classify", "base", PROMPT)
    lab.submit("mate", PROMPT)
    lab.run()
    assert "`adapter_id` must name an adapter with a head" in str(lab.ending("base").error)
    assert lab.finished("mate")


def test_a_head_leaves_generation_as_it_is_without_it(tmp_path: Path) -> None:
    classifier = Classifier("llama", CONFIGS["lora"]("SEQ_CLS"), tmp_path)
    lab = Lab(tiny_model("llama"), {}, slots=4)
    adapter = classifier.adapter(lab.runner.base.shape)
    bare = Adapter(Digest.of(b"bare"), tuple(part for part in adapter.parts if part.head is None))
    only = alone(linear_head())
    lab.adapters = {a.digest: a for a in (adapter, bare, only)}
    lab.submit("base", PROMPT)
    lab.submit("only a head", PROMPT, only.digest)
    lab.submit("with", PROMPT, adapter.digest)
    lab.submit("without", PROMPT, bare.digest)
    lab.run()
    assert lab.tokens("only a head") == lab.tokens("base")
    assert lab.tokens("with") == lab.tokens("without") != lab.tokens("base")


def test_a_step_that_is_run_again_in_halves_adds_no_position_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(tiny_model("llama"), {}, max_batch_tokens=9)
    read, calls = lab.runner._readout.read, []

    def stumbling(rows: list[Row], begins: list[int]) -> dict[Sequence, Sample]:
        calls.append(len(rows))
        found = read(rows, begins)
        if len(rows) > 1:
            raise RuntimeError("out of memory")
        return found

    monkeypatch.setattr(lab.runner._readout, "read", stumbling)
    lab.ask("embed", "a", PROMPT)
    lab.ask("embed", "b", PROMPT[:7])
    lab.run()
    assert max(calls) > 1
    torch.testing.assert_close(lab.scores("a")[0], hidden_states("llama", PROMPT).mean(0), atol=1e-3, rtol=0)
