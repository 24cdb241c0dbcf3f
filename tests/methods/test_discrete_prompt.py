"""Discrete prompts: the template's head run once equals the plain prompt, token for token, and limits have names."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import Adapter, BaseShape, Checkpoint, Limits, Part
from server.methods.discrete_prompt import MAX_CONTINUATIONS, MAX_LABELS, MAX_TEMPLATE, MAX_WORD_TOKENS, MAX_WORDS
from server.methods.read import describe, read_parts
from tests.lab import Lab

BOS = 1
DIGEST = Digest.of(b"a template")
HEAD, TAIL = "Review: ", "\nIt was"


def tokens(text: str, first: bool) -> list[int]:
    """One token per character, and a token that opens a text."""
    return [BOS] * first + [3 + ord(character) % 90 for character in text]


BASE = BaseShape(Digest("0" * 64), "tiny", 12, 2, 4, 2, 3, 97, 64, {}, tokens=tokens)


def read(template: str, verbalizer: Mapping[str, Sequence[str]] | None = None, limits: Limits | None = None) -> Part:
    checkpoint = Checkpoint("discrete_prompt", {"template": template, "verbalizer": verbalizer})
    return METHODS["discrete_prompt"].read(checkpoint, BASE, limits or Limits())


def upload(folder: Path, **fields: Any) -> Mapping[str, Path]:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "DISCRETE_PROMPT", **fields}))
    return {path.name: path}


def lab_of(model: Any, template: str = f"{HEAD}{{input}}{TAIL}", **options: Any) -> Lab:
    lab = Lab(copy.deepcopy(model), {}, **options)
    lab.adapters[DIGEST] = Adapter(DIGEST, (read(template),))
    return lab


# -- what is read ----------------------------------------------------------------------------------------------------


def test_the_head_becomes_a_prefix_of_tokens_and_the_rest_is_told():
    part = read(f"{HEAD}{{input}}{TAIL}", {"good": [" great", " fine"], "bad": [" awful"]})
    assert part.prefix.ids.tolist() == tokens(HEAD, True)
    assert (part.pool, dict(part.sites), part.prefix.length) == (None, {}, 1 + len(HEAD))
    assert part.told == {
        "template": {"headed": True, "tail": TAIL},
        "verbalizer": {"good": [" great", " fine"], "bad": [" awful"]},
    }


@pytest.mark.parametrize(("template", "tail"), [("{input}", ""), ("{input} {x} {{}}", " {x} {{}}")])
def test_a_template_without_a_head_has_no_prefix(template, tail):
    part = read(template)
    assert part.prefix is None
    assert part.told == {"template": {"headed": False, "tail": tail}, "verbalizer": None}


def test_an_upload_needs_no_tensors(tmp_path):
    base = replace(BASE, tokens=tokens)
    (part,) = read_parts(upload(tmp_path, template="Say {input}!", verbalizer={"a": ["x"], "b": ["y"]}), base, Limits())
    told = describe([part])
    assert (told["methods"], told["virtual_tokens"], told["parameters"]) == (["discrete_prompt"], 5, 0)
    assert (told["template"], told["verbalizer"]) == ({"headed": True, "tail": "!"}, {"a": ["x"], "b": ["y"]})


# -- through the engine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("budget", [3, 24])
def test_the_answers_are_those_to_the_plain_prompt(name, budget, models):
    lab = lab_of(models[name], max_batch_tokens=budget)
    inputs = ["a fine film", "no", "I slept through all of it"]
    for index, text in enumerate(inputs):
        behind = tokens(text, False) + tokens(TAIL, False)
        lab.submit(f"prompt {index}", behind, DIGEST)
        lab.submit(f"plain {index}", tokens(HEAD, True) + behind)
    lab.run()
    for index in range(len(inputs)):
        assert lab.tokens(f"prompt {index}") == lab.tokens(f"plain {index}")
        torch.testing.assert_close(lab.logits(f"prompt {index}"), lab.logits(f"plain {index}"), atol=1e-4, rtol=0)


def test_the_head_is_run_once_for_all_requests(models):
    lab = lab_of(models["llama"], max_batch_tokens=200)
    counted = []
    lab.observer.observe_step = lambda rows, tokens, **_: counted.append(tokens)
    for index in range(5):
        lab.submit(str(index), tokens("ok", False), DIGEST, max_new_tokens=1)
    lab.run()
    assert sum(counted) == 1 + len(HEAD) + 5 * 2


def test_penalties_see_the_head_as_part_of_the_prompt(models):
    lab = lab_of(models["llama"])
    behind = tokens("well", False)
    lab.submit("prompt", behind, DIGEST, repetition_penalty=5.0, max_new_tokens=12)
    lab.submit("plain", tokens(HEAD, True) + behind, repetition_penalty=5.0, max_new_tokens=12)
    lab.submit("without", behind, DIGEST, max_new_tokens=12)
    lab.run()
    assert lab.tokens("prompt") == lab.tokens("plain") != lab.tokens("without")


def test_a_composed_adapter_acts_on_the_head_too(models):
    lab = lab_of(models["llama"])
    shift = torch.randn(32, generator=torch.Generator().manual_seed(3))
    bias = Adapter(Digest.of(b"bias"), (Part("bitfit", "bitfit", {"model.layers.0.mlp.down_proj": {"delta": shift}}),))
    lab.adapters[bias.digest] = bias
    behind = tokens("composed", False)
    lab.submit("prompt", behind, bias.digest, DIGEST)
    lab.submit("plain", tokens(HEAD, True) + behind, bias.digest)
    lab.submit("alone", behind, DIGEST)
    lab.run()
    assert lab.tokens("prompt") == lab.tokens("plain") != lab.tokens("alone")


def test_a_preempted_request_is_recomputed_behind_its_head(models):
    lab = lab_of(models["llama"], blocks=14, block_size=4)
    for index in range(4):
        lab.submit(str(index), tokens(f"text {index}", False), DIGEST, max_new_tokens=8)
    lab.run()
    assert lab.observer.preemptions
    roomy = lab_of(models["llama"])
    for index in range(4):
        roomy.submit(str(index), tokens(f"text {index}", False), DIGEST, max_new_tokens=8)
    roomy.run()
    assert [lab.tokens(str(index)) for index in range(4)] == [roomy.tokens(str(index)) for index in range(4)]


# -- what is refused -------------------------------------------------------------------------------------------------


def words(count: int, start: int = 0) -> list[str]:
    return [chr(0x100 + start + index) for index in range(count)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no place", "template: must hold {input} exactly once, it holds it 0 times"),
        ("{input} and {input}", "template: must hold {input} exactly once, it holds it 2 times"),
        ("{Input}", "template: must hold {input} exactly once, it holds it 0 times"),
        ("x" * MAX_TEMPLATE + "{input}", f"template: has {MAX_TEMPLATE + 7} characters, over the limit of {MAX_TEMPLATE}"),
        ("x" * 20 + "{input}", "template: 21 is over this server's limit of 20 virtual tokens"),
        ("{input}" + "x" * 21, "template: 21 is over this server's limit of 20 virtual tokens"),
        ("x" * 10 + "{input}" + "x" * 10, "template: 21 is over this server's limit of 20 virtual tokens"),
    ],
)
def test_a_template_over_its_limits_is_refused(template, message):
    with pytest.raises(AdapterError) as refused:
        read(template, limits=Limits(max_virtual_tokens=20))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("verbalizer", "message"),
    [
        ({}, "has 0 labels; accepted: 2 to 64"),
        ({"a": ["x"]}, "has 1 labels; accepted: 2 to 64"),
        ({str(n): ["x"] for n in range(MAX_LABELS + 1)}, "has 65 labels; accepted: 2 to 64"),
        ({"a": ["x"], "b": []}, "'b' has no words"),
        ({"a": ["x"], "": ["y"]}, "has a label of 0 characters; accepted: 1 to 128"),
        ({"a": ["x"], "b" * 129: ["y"]}, "has a label of 129 characters; accepted: 1 to 128"),
        ({"a": words(MAX_WORDS), "b": ["x"]}, "has 257 words; accepted: 1 to 256"),
        ({"a": ["x", "y", "x"], "b": ["z"]}, "the word 'x' of 'a' is there twice"),
        ({"a": ["x"], "b": [""]}, "the word '' of 'b' has 0 tokens; accepted: 1 to 16"),
        ({"a": ["x"], "b": ["y" * (MAX_WORD_TOKENS + 1)]}, f"the word '{'y' * 17}' of 'b' has 17 tokens; accepted: 1 to 16"),
        (
            {"a": [f"{first}{second}" for first in "abcdefgh" for second in "stuvwxyz"], "b": ["0123456789", "98765"]},
            None,
        ),
        (
            {"a": [f"{chr(n)}12345" for n in range(65, 78)], "b": ["x"]},
            f"needs 65 continuations for its words of several tokens, over the limit of {MAX_CONTINUATIONS}",
        ),
    ],
)
def test_a_verbalizer_over_its_limits_is_refused(verbalizer, message):
    if message is None:
        read("{input}", verbalizer)
        return
    with pytest.raises(AdapterError) as refused:
        read("{input}", verbalizer)
    assert str(refused.value) == f"verbalizer: {message}"


def test_a_base_without_a_tokenizer_cannot_read_a_template():
    base = BaseShape(Digest("0" * 64), "tiny", 12, 2, 4, 2, 3, 97, 64, {})
    with pytest.raises(AdapterError, match=r"^template: is text, and here the base model has no tokenizer"):
        METHODS["discrete_prompt"].read(Checkpoint("discrete_prompt", {"template": "a {input}"}), base, Limits())
