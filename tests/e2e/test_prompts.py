"""Prompts of a real server process that ask more of a request than a name: templates, verbalizers, tasks to choose from.

The oracles are the plain prompt on the base itself, the Hugging Face model's own probabilities, and PEFT's generate.
"""

from __future__ import annotations

import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.model.text import Text
from tests.process import ServerProcess

HEAD, TAIL = "Review: the ", "\nIt was"
VERBALIZER = {"positive": [" cat", " hello"], "negative": [" terrible", " map", "."]}
TEXTS = ["cat sat on the mat", "hello world, how are you today? " * 8, "mat"]


@pytest.fixture(scope="module")
def text(tiny_base: Path) -> Text:
    return Text(AutoTokenizer.from_pretrained(tiny_base))


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


def post(server: ServerProcess, path: str, status: int = 200, **body: Any) -> Any:
    response = server.http.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


@pytest.fixture(scope="module")
def review(tiny_server: ServerProcess) -> str:
    config = {"peft_type": "DISCRETE_PROMPT", "template": f"{HEAD}{{input}}{TAIL}", "verbalizer": VERBALIZER}
    uploaded = tiny_server.upload("review", {"adapter_config.json": json.dumps(config).encode()})
    assert (uploaded.status_code, uploaded.json()["method"]) == (201, "discrete_prompt")
    assert uploaded.json()["details"]["verbalizer"] == VERBALIZER
    return "review"


def plain(text: Text, inputs: str) -> list[int]:
    """The whole prompt, piece by piece."""
    pieces = ((HEAD, True), (inputs, False), (TAIL, False))
    return [id for piece, first in pieces for id in text.encode_piece(piece, first)]


def test_a_template_answers_as_the_plain_prompt_on_the_base(tiny_server: ServerProcess, review: str, text: Text) -> None:
    sampling = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    for inputs in TEXTS:
        framed = post(tiny_server, "/v1/completions", model=review, prompt=inputs, **sampling)
        whole = post(
            tiny_server, "/v1/completions", model=str(tiny_base_name(tiny_server)), prompt=plain(text, inputs), **sampling
        )
        assert framed["choices"][0]["text"] == whole["choices"][0]["text"]
        parameters = {"max_new_tokens": 12, "ignore_eos_token": True}
        generated = post(tiny_server, "/generate", inputs=inputs, adapter_id=review, parameters=parameters)
        assert generated["generated_text"] == framed["choices"][0]["text"]


def tiny_base_name(server: ServerProcess) -> str:
    return str(server.http.get("/info").json()["model_id"])


def test_label_probabilities_are_the_models_own(tiny_server: ServerProcess, review: str, text: Text, model: Any) -> None:
    with ThreadPoolExecutor(4) as threads:
        mates = [threads.submit(tiny_server.generate, inputs, review, max_new_tokens=8) for inputs in TEXTS]
        answers = post(tiny_server, "/classify", inputs=TEXTS, adapter_id=review)
        assert all(mate.result().status_code == 200 for mate in mates)
    words = {label: [text.encode(word, special=False) for word in given] for label, given in VERBALIZER.items()}
    assert {len(ids) > 1 for given in words.values() for ids in given} == {True, False}
    for inputs, answer in zip(TEXTS, answers, strict=True):
        masses = {
            label: sum(math.exp(logprob(model, plain(text, inputs), ids)) for ids in given) for label, given in words.items()
        }
        expected = {label: mass / sum(masses.values()) for label, mass in masses.items()}
        assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(expected, rel=1e-3)
        assert post(tiny_server, "/classify", inputs=inputs, adapter_id=review) == answer


def logprob(model: Any, prompt: list[int], word: list[int]) -> float:
    with torch.inference_mode():
        rows = model(torch.tensor([[*prompt, *word]])).logits[0].double().log_softmax(-1)
    return sum(float(rows[len(prompt) - 1 + at, id]) for at, id in enumerate(word))


def test_the_tasks_of_a_multitask_prompt_answer_as_peft_does(
    tiny_server: ServerProcess, model: Any, text: Text, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        config = peft.MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM",  # type: ignore[arg-type]
            num_virtual_tokens=6,
            num_tasks=3,
            num_ranks=2,
        )
        oracle = peft.get_peft_model(model, config).eval()
        for parameter in oracle.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        oracle.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".md"}
    assert tiny_server.upload("tasks", files).json()["details"]["tasks"] == 3
    ids = torch.tensor([text.encode(TEXTS[0])])
    for task in range(3):
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            mask, given = torch.ones_like(ids), torch.tensor([task])
            wanted = oracle.generate(
                input_ids=ids, attention_mask=mask, task_ids=given, max_new_tokens=8, do_sample=False, eos_token_id=None
            )
        parameters = {"max_new_tokens": 8, "details": True, "ignore_eos_token": True, "task_id": task}
        answer = post(tiny_server, "/generate", inputs=TEXTS[0], adapter_id="tasks", parameters=parameters)
        assert [token["id"] for token in answer["details"]["tokens"]] == wanted[0, ids.shape[1] :].tolist()
    refused = post(tiny_server, "/generate", 422, inputs="a", adapter_id="tasks")
    assert refused["error"] == "Input validation error: `task_id` is required: 'tasks' has 3 tasks, 0 to 2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "no place"}, "template: must hold {input} exactly once, it holds it 0 times"),
        ({"template": "x" * 600 + "{input}"}, "template: 600 is over this server's limit of 512 virtual tokens"),
        ({"template": "{input}", "verbalizer": {"a": ["x"]}}, "verbalizer: has 1 labels; accepted: 2 to 64"),
        ({"template": "{input}", "verbalizer": {"a": ["x"], "b": [""]}}, "verbalizer: the word '' of 'b' has 0 tokens"),
    ],
)
def test_a_discrete_prompt_that_cannot_be_served_is_refused(
    tiny_server: ServerProcess, fields: dict[str, Any], message: str
) -> None:
    config = {"peft_type": "DISCRETE_PROMPT", **fields}
    response = tiny_server.upload("refused", {"adapter_config.json": json.dumps(config).encode()})
    assert (response.status_code, response.json()["error_type"]) == (422, "adapter")
    assert response.json()["error"].startswith(message)
