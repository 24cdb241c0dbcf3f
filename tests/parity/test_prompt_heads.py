"""A classifier beside a prompt, as PEFT saves them in one file: /classify's scores are the library's own logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from adapters_store.digest import Digest
from server.methods.base import Adapter, Limits
from server.methods.read import read_parts
from server.recipes import Task
from tests.lab import Lab
from tests.tiny import tiny_model

DIGEST = Digest.of(b"a prompt and a head")
PROMPTS = [[11, 30, 5, 76, 40], [7], [90, 3, 61, 61, 8, 17, 22, 54, 33]]
CONFIGS: Mapping[str, Callable[..., Any]] = {
    "prefix_tuning": peft.PrefixTuningConfig,
    "prompt_tuning": peft.PromptTuningConfig,
    "p_tuning": lambda **fields: peft.PromptEncoderConfig(**fields, encoder_hidden_size=8),
    "multitask_prompt_tuning": lambda **fields: peft.MultitaskPromptTuningConfig(**fields, num_tasks=3, num_ranks=2),
}


def saved(name: str, kind: str, folder: Path) -> Any:
    """A classifier over the tiny base behind a random prompt, saved; the model is the oracle."""
    base = tiny_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        config = copy.deepcopy(base.config)
        config.num_labels = 4
        model = AutoModelForSequenceClassification.from_config(config)
        model.load_state_dict(base.state_dict(), strict=False)
        oracle = peft.get_peft_model(model, CONFIGS[kind](task_type="SEQ_CLS", num_virtual_tokens=5)).eval()
        for parameter in oracle.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        oracle.save_pretrained(folder)
    return oracle


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prompt_with_a_head_scores_as_peft_does(name: str, kind: str, tmp_path: Path) -> None:
    oracle = saved(name, kind, tmp_path)
    lab = Lab(tiny_model(name), {})
    paths = {path.name: path for path in tmp_path.iterdir()}
    parts = read_parts(paths, lab.runner.base.shape, Limits())
    assert {part.method for part in parts} == {kind, "head"}
    lab.adapters[DIGEST] = Adapter(DIGEST, parts)
    several = kind == "multitask_prompt_tuning"
    recipes = (Task(DIGEST, 2),) if several else ()
    for index, prompt in enumerate(PROMPTS):
        lab.ask("classify", str(index), prompt, *([recipe.digest for recipe in recipes] or [DIGEST]), recipes=recipes)
    lab.run()
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        given = {"task_ids": torch.tensor([2])} if several else {}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            wanted = oracle(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits
        torch.testing.assert_close(lab.scores(str(index)), wanted, atol=1e-3, rtol=0)
