"""/classify by a verbalizer: label probabilities are those of a direct computation, in as few requests as possible."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from server.api.verbalizer import Words
from server.requests import Request
from tests.tiny import tiny_model

from .conftest import World
from .fakes import tiny_tokenizer

PREFIX = "Input validation error: "
TEMPLATE = {"headed": False, "tail": " the"}
#: With the tests' tokenizer: words of one token, of several, one that begins like another, and one that begins another.
VERBALIZER = {"pets": [" cat", " ca"], "places": [" mat", " map", " the mat"], "other": ["."]}


def probabilities(model: PreTrainedModel, prompt: list[int], words: list[list[list[int]]]) -> list[float]:
    """p(label), word by word: a run over prompt + word gives the probability of each of the word's tokens."""
    masses = []
    for label in words:
        mass = 0.0
        for ids in label:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
            mass += math.exp(sum(float(logits[len(prompt) - 1 + at, id]) for at, id in enumerate(ids)))
        masses.append(mass)
    return [mass / sum(masses) for mass in masses]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return _sized(len(tiny_tokenizer()))


def _sized(vocabulary: int) -> PreTrainedModel:
    model = tiny_model("llama")
    torch.manual_seed(11)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight.normal_(std=0.3)
    return model.eval()


def scorer_of(model: PreTrainedModel) -> Callable[[Request], tuple[tuple[float, ...], ...]]:
    """What the engine does with task "score", without the engine."""

    def score(request: Request) -> tuple[tuple[float, ...], ...]:
        with torch.no_grad():
            logprobs = model(torch.tensor([request.prompt])).logits[0, -1].log_softmax(-1)
        return (tuple(logprobs[torch.tensor(request.choices)].tolist()),)

    return score


def words_of(world: World, verbalizer: dict[str, list[str]]) -> list[list[list[int]]]:
    return [[world.text.encode(word, special=False) for word in words] for words in verbalizer.values()]


async def classify(world: World, inputs: Any, **more: Any) -> Any:
    return await world.post("/classify", {"inputs": inputs, "adapter_id": "answers", **more})


async def test_label_probabilities_are_those_of_a_direct_computation(world: World, model: PreTrainedModel) -> None:
    world.add("answers", template=TEMPLATE, verbalizer=VERBALIZER)
    world.engine.scorer = scorer_of(model)
    words = words_of(world, VERBALIZER)
    assert any(len(ids) > 1 for label in words for ids in label)
    texts = ["hello world", "the cat sat on"]
    answers = (await classify(world, texts)).json()
    for text, answer in zip(texts, answers, strict=True):
        expected = probabilities(model, world.text.encode(text) + world.text.encode(" the"), words)
        found = {entry["label"]: entry["score"] for entry in answer}
        assert [found[label] for label in VERBALIZER] == pytest.approx(expected, rel=1e-4)
        assert [entry["score"] for entry in answer] == sorted(found.values(), reverse=True)
        assert sum(found.values()) == pytest.approx(1.0)


async def test_words_of_one_token_cost_one_request_per_text(world: World) -> None:
    verbalizer = {"yes": [" cat"], "no": [" the", "."]}
    assert all(len(ids) == 1 for label in words_of(world, verbalizer) for ids in label)
    record = world.add("answers", virtual=2, template={"headed": True, "tail": ""}, verbalizer=verbalizer)
    world.engine.scorer = lambda request: (tuple(math.log(0.1 * (1 + at)) for at in range(len(request.choices))),)
    response = await classify(world, ["hello", "world"])
    assert [request.task for request in world.engine.submitted] == ["score", "score"]
    firsts = tuple(ids[0] for label in words_of(world, verbalizer) for ids in label)
    assert {request.choices for request in world.engine.submitted} == {firsts}
    assert world.last.adapters == (record.digest,)
    assert response.json()[0] == [
        {"label": "no", "score": pytest.approx(0.5 / 0.6)},
        {"label": "yes", "score": pytest.approx(0.1 / 0.6)},
    ]


async def test_continuations_run_behind_the_prompt_and_once_per_beginning(world: World, model: PreTrainedModel) -> None:
    world.add("answers", template=TEMPLATE, verbalizer=VERBALIZER)
    world.engine.scorer = scorer_of(model)
    await classify(world, ["hello", "world"])
    beginnings = {tuple(ids[:at]) for label in words_of(world, VERBALIZER) for ids in label for at in range(len(ids))}
    prompts = [request.prompt for request in world.engine.submitted]
    assert len(prompts) == len(set(prompts)) == 2 * len(beginnings)
    assert len({request.id for request in world.engine.submitted}) == len(prompts)
    whole = [(*world.text.encode(text), *world.text.encode(" the")) for text in ("hello", "world")]
    assert prompts[:2] == whole  # before any continuation
    assert set(prompts) == {(*prompt, *beginning) for prompt in whole for beginning in beginnings}


async def test_raw_scores_are_logs_of_probability_mass(world: World) -> None:
    world.add("answers", template=TEMPLATE, verbalizer={"yes": [" cat", " mat"], "no": ["."]})
    world.engine.scorer = lambda request: ((-1.0, -2.0, -0.5),)
    scores = {entry["label"]: entry["score"] for entry in (await classify(world, "hello", raw_scores=True)).json()}
    assert scores == pytest.approx({"yes": math.log(math.exp(-1) + math.exp(-2)), "no": -0.5})


async def test_words_that_do_not_fit_behind_the_text_are_refused(world: World) -> None:
    world.add(
        "answers", virtual=50, template={"headed": True, "tail": ""}, verbalizer={"a": [" cat sat on the mat"], "b": ["."]}
    )
    world.engine.scorer = lambda request: (tuple(-1.0 for _ in request.choices),)
    room = 100 - 50
    longest = len(world.text.encode(" cat sat on the mat", special=False))
    fits = "!" * (room - longest + 1)
    assert (await classify(world, fits)).status_code == 200
    response = await classify(world, fits + "!")
    assert (response.status_code, response.json()["error"]) == (
        422,
        f"{PREFIX}`inputs` must leave room for the verbalizer's words within 100 tokens. Given: 101 with the longest",
    )


async def test_an_adapter_without_words_or_head_cannot_classify(world: World) -> None:
    world.add("answers", template=TEMPLATE, verbalizer=None)
    response = await classify(world, "hello")
    assert response.status_code == 422
    assert response.json()["error"].endswith("to classify with; adapter 'answers' has none")


async def test_a_verbalizer_and_a_head_cannot_both_answer(world: World) -> None:
    world.add("answers", template=TEMPLATE, verbalizer={"a": ["x"], "b": ["y"]})
    world.add("mood", head={"task_type": "SEQ_CLS", "pooling": "last", "labels": ["a", "b"]})
    world.store.bind_user("default", "alice", "mood")
    response = await classify(world, "hello", user_id="alice", parameters={"compose": True})
    assert response.status_code == 422
    assert "at most one" in response.json()["error"]


def test_choices_are_the_tree_of_the_words(world: World) -> None:
    words = Words(("a", "b"), (((1,), (1, 2)), ((1, 2, 3), (4,))))
    assert words.choices == {(): (1, 4), (1,): (2,), (1, 2): (3,)}
    assert words.longest == 3
    found = words.scores({(): {1: -1.0, 4: -2.0}, (1,): {2: -3.0}, (1, 2): {3: -4.0}})
    assert found == pytest.approx([math.log(math.exp(-1) + math.exp(-4)), math.log(math.exp(-8) + math.exp(-2))])


def test_masses_that_underflow_still_compare() -> None:
    words = Words(("a", "b"), (((1,),), ((2,),)))
    assert words.scores({(): {1: -2000.0, 2: -2001.0}}) == [-2000.0, -2001.0]
