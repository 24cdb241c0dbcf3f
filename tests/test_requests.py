"""Requests and events: plain data that could cross a process border."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import pytest

from adapters_store.digest import Digest
from server.errors import GenerationError
from server.requests import Event, FinishReason, Request, Sampling, Token

REQUEST = Request("id", "acme", (Digest.of(b"a"),), (1, 2), Sampling(max_new_tokens=3, seed=7))
EVENT = Event("id", (Token(5, -0.5, ((5, -0.5), (6, -1.0))),), FinishReason.LENGTH, prompt=(Token(1, None),))


def test_sampling_is_greedy_and_without_rules_unless_told_otherwise() -> None:
    neutral = Sampling(max_new_tokens=1)
    assert (neutral.do_sample, neutral.temperature) == (False, 1.0)
    assert (neutral.top_k, neutral.top_p, neutral.typical_p) == (None, None, None)
    assert (neutral.repetition_penalty, neutral.frequency_penalty, neutral.presence_penalty) == (1.0, 0.0, 0.0)
    assert (neutral.ignore_eos, neutral.top_n, neutral.prompt_logprobs) == (False, 0, False)


@pytest.mark.parametrize("value", [REQUEST, REQUEST.sampling, EVENT, EVENT.tokens[0]])
def test_values_are_frozen_hashable_and_survive_a_process_border(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    assert hash(value) == hash(pickle.loads(pickle.dumps(value)))
    names = getattr(value, "_fields", None) or [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        setattr(value, names[0], None)
    assert getattr(value, names[0]) is not None
    assert not hasattr(value, "__dict__")


def test_an_event_with_an_error_crosses_too() -> None:
    event = pickle.loads(pickle.dumps(Event("id", finish=FinishReason.ERROR, error=GenerationError("broke"))))
    assert isinstance(event.error, GenerationError)
    assert str(event.error) == "broke"


def test_finish_reasons_are_tgis_words() -> None:
    assert {"length", "eos_token", "stop_sequence"} <= {str(reason) for reason in FinishReason}


def test_the_border_needs_neither_torch_nor_http() -> None:
    check = "import sys, server.requests; print(sorted({'torch', 'fastapi', 'transformers'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
