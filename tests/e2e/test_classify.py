"""/classify and /embed of a real server process, against the libraries that define what is uploaded, amid generations."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from tests.process import ServerProcess

TEXTS = ["the cat sat on the mat", "hello world, how are you today? " * 8]
NAMES = {0: "bad", 1: "good", 2: "so-so"}


class Oracle:
    """A tiny classifier under a LoRA, and the files PEFT saved of it; label names are written into the config by hand."""

    def __init__(self, base: Path, task: str, folder: Path) -> None:
        kind: Any = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForTokenClassification
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(11)
            model = kind.from_pretrained(base, num_labels=3, dtype=torch.float32)
            config = peft.LoraConfig(task_type=task, r=4, target_modules=["q_proj", "down_proj"])
            self.model = peft.get_peft_model(model, config).eval()
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(std=0.3)
            self.model.save_pretrained(str(folder))
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}
        stored = json.loads(self.files["adapter_config.json"])
        self.files["adapter_config.json"] = json.dumps({**stored, "id2label": NAMES}).encode()

    def logits(self, text: str) -> torch.Tensor:
        with torch.inference_mode():
            inputs = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            logits: torch.Tensor = self.model(**inputs).logits[0]
        return logits


@pytest.fixture(scope="module", params=["SEQ_CLS", "TOKEN_CLS"])
def oracle(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tiny_base, request.param, tmp_path_factory.mktemp(request.param))


def post(server: ServerProcess, path: str, **body: Any) -> Any:
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_saved_classifier_answers_as_peft_does(tiny_server: ServerProcess, oracle: Oracle) -> None:
    task = oracle.model.active_peft_config.task_type
    name = f"classifier-{task}"
    uploaded = tiny_server.upload(name, oracle.files)
    assert (uploaded.status_code, uploaded.json()["method"]) == (201, "lora+head")
    assert uploaded.json()["details"]["head"] == {"task_type": task, "pooling": "last", "labels": list(NAMES.values())}
    with ThreadPoolExecutor(8) as threads:
        mates = [
            threads.submit(post, tiny_server, "/generate", inputs=text, parameters={"adapter_id": name, "max_new_tokens": 8})
            for text in TEXTS * 2
        ]
        answers = post(tiny_server, "/classify", inputs=TEXTS, adapter_id=name)
        assert all(mate.result()["generated_text"] for mate in mates)
    assert answers == [post(tiny_server, "/classify", inputs=text, parameters={"adapter_id": name}) for text in TEXTS]
    for text, answer in zip(TEXTS, answers, strict=True):
        wanted = oracle.logits(text).softmax(-1)
        if task == "SEQ_CLS":
            ranked = wanted.argsort(descending=True).tolist()
            assert [entry["label"] for entry in answer] == [NAMES[label] for label in ranked]
            assert [entry["score"] for entry in answer] == pytest.approx(wanted[ranked].tolist(), abs=1e-3)
        else:
            assert [entry["entity"] for entry in answer] == [NAMES[label] for label in wanted.argmax(-1).tolist()]
            assert [entry["score"] for entry in answer] == pytest.approx(wanted.amax(-1).tolist(), abs=1e-3)
            assert "".join(text[entry["start"] : entry["end"]] for entry in answer) == text


def test_embeddings_are_the_models_own(tiny_server: ServerProcess, tiny_base: Path) -> None:
    model = AutoModel.from_pretrained(tiny_base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    means = post(tiny_server, "/embed", inputs=TEXTS)["embeddings"]
    lasts = post(tiny_server, "/embed", inputs=TEXTS, pooling="last", normalize=False)["embeddings"]
    for text, mean, last in zip(TEXTS, means, lasts, strict=True):
        with torch.inference_mode():
            states = model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
        assert mean == pytest.approx(torch.nn.functional.normalize(states.mean(0), dim=0).tolist(), abs=1e-3)
        assert last == pytest.approx(states[-1].tolist(), abs=1e-3)


def probe(**config: Any) -> dict[str, bytes]:
    """An MLP probe in this server's own format."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"dense.weight": (8, 32), "dense.bias": (8,), "score.weight": (2, 8), "score.bias": (2,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    fields = {"peft_type": "HEAD", "task_type": "SEQ_CLS", "pooling": "mean", "hidden": 8, "activation": "relu", **config}
    return {"adapter_config.json": json.dumps(fields).encode(), "adapter_model.safetensors": save(tensors)}


def test_a_probe_alone_classifies_and_leaves_generation_alone(tiny_server: ServerProcess) -> None:
    assert tiny_server.upload("probe", probe(num_labels=2)).status_code == 201
    labels = {entry["label"] for entry in post(tiny_server, "/classify", inputs=TEXTS[0], adapter_id="probe")}
    assert labels == {"LABEL_0", "LABEL_1"}
    parameters = {"max_new_tokens": 6, "ignore_eos_token": True}
    assert post(tiny_server, "/generate", inputs=TEXTS[0], adapter_id="probe", parameters=parameters) == post(
        tiny_server, "/generate", inputs=TEXTS[0], parameters=parameters
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pooling": "cls"}, "pooling: 'cls' needs a first token that sees the whole text; a causal base has none"),
        ({"num_labels": 3}, "num_labels: is 3, but score.weight has 2 rows"),
        ({"hidden": 9}, "hidden: is 9, dense.weight has 8 rows"),
        ({"activation": "crelu"}, "activation: activation 'crelu' is not supported"),
    ],
)
def test_a_bad_head_is_refused_by_name(tiny_server: ServerProcess, config: dict[str, Any], message: str) -> None:
    response = tiny_server.upload("bad-probe", probe(**config))
    assert (response.status_code, response.json()["error_type"]) == (422, "adapter")
    assert response.json()["error"].startswith(message)
