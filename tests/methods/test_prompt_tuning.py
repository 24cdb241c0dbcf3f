"""Prompt tuning and P-tuning: the embeddings in front of the text's, through the untouched base, give PEFT's logits."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CPTConfig, MultitaskPromptTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from adapters_store.digest import Digest
from server.errors import AdapterError
from server.methods import METHODS
from server.methods.base import Adapter, BaseShape, Checkpoint, Limits, Part, Prefix
from server.methods.read import describe, read_parts
from server.recipes import Task
from tests.lab import Lab

CONFIGS = {
    "prompt_tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "cpt": CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1, 1, 0, 1], cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
    "p_tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "p_tuning, LSTM": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma", "opt"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_soft_prompt_gives_pefts_logits(name, kind, trained, models, ids):
    adapter = trained(name, CONFIGS[kind])
    (part,) = adapter.parts()
    assert part.method == kind.partition(",")[0]

    soft = part.prefix.embeddings.expand(len(ids), -1, -1)
    with torch.no_grad():
        text = models[name].get_input_embeddings()(ids)
        logits = models[name](inputs_embeds=torch.cat([soft, text], dim=1)).logits
        alone = models[name](ids).logits

    expected = adapter.logits(ids)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert (expected[:, 4:] - alone).abs().max() > 0.01


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "cpt"])
@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        ((4, 13), {}, r"prompt_embeddings: has shape \[4, 13\], the base model needs \[4, 12\]"),
        ((4, 12), {"token_dim": 13}, "token_dim: is 13, but 12 is needed"),
        ((4, 12), {"num_layers": 3}, "num_layers: is 3, but 2 is needed"),
        ((4, 12), {"num_attention_heads": 2}, "num_attention_heads: is 2, but 4 is needed"),
        ((4, 12), {"num_virtual_tokens": 5}, "num_virtual_tokens: is 5, but 4 is needed"),
        ((21, 12), {}, "num_virtual_tokens: 21 is over this server's limit of 20"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(method, shape, config, message):
    base = BaseShape(Digest("0" * 64), "tiny", 12, 2, 4, 2, 3, 9, 32, {})
    checkpoint = Checkpoint(method, config, loose={"prompt_embeddings": torch.ones(shape)})
    with pytest.raises(AdapterError, match=message):
        METHODS[method].read(checkpoint, base, Limits(max_virtual_tokens=20))


# -- through the engine, against PEFT's own generate -----------------------------------------------------------------

PROMPT = [11, 30, 5, 76, 40]
DIGEST = Digest.of(b"a soft prompt")


class Saved:
    """A prompt that PEFT trained (as far as random numbers go) and saved; PEFT is the oracle."""

    def __init__(self, model: Any, config: Any, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.oracle = get_peft_model(copy.deepcopy(model), config).eval()
        generator = torch.Generator().manual_seed(7)
        for parameter in self.oracle.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=1.0, generator=generator)
        self.oracle.save_pretrained(folder)
        self.paths = {path.name: path for path in folder.iterdir()}

    def tokens(self, count: int = 6, **given: Tensor) -> list[int]:
        ids = torch.tensor([PROMPT])
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            out = self.oracle.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **given,
            )
        return out[0, len(PROMPT) :].tolist()


def lab_of(model: Any, saved: Saved) -> Lab:
    lab = Lab(copy.deepcopy(model), {})
    lab.adapters[DIGEST] = Adapter(DIGEST, read_parts(saved.paths, lab.runner.base.shape, Limits()))
    return lab


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_task_of_a_multitask_prompt_gives_pefts_tokens_in_one_batch(name, ranks, models, tmp_path):
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=ranks)
    saved = Saved(models[name], config, tmp_path)
    lab = lab_of(models[name], saved)
    for task in range(3):
        lab.submit(f"task {task}", PROMPT, Task(DIGEST, task))
        lab.submit(f"task {task} again", PROMPT, Task(DIGEST, task))
    lab.submit("base", PROMPT)
    lab.run()

    expected = [saved.tokens(task_ids=torch.tensor([task])) for task in range(3)]
    assert [lab.tokens(f"task {task}") for task in range(3)] == expected
    assert [lab.tokens(f"task {task} again") for task in range(3)] == expected
    assert len({tuple(tokens) for tokens in [*expected, lab.tokens("base")]}) == 4


def test_a_multitask_prompt_tells_how_many_tasks_it_has_and_keeps_its_factors(models, tmp_path):
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=2)
    saved = Saved(models["llama"], config, tmp_path)
    parts = lab_of(models["llama"], saved).adapters[DIGEST].parts
    told = describe(parts)
    assert (told["tasks"], told["virtual_tokens"]) == (3, 5)
    assert told["parameters"] == 5 * 32 + 3 * 5 * 2 + 3 * 2 * 32
    assert parts[0].prefix.nbytes == 4 * told["parameters"]  # not tasks * virtual tokens * hidden


def test_a_multitask_prompt_is_not_served_without_a_task(models, tmp_path):
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=2)
    lab = lab_of(models["llama"], Saved(models["llama"], config, tmp_path))
    lab.submit("none", PROMPT, DIGEST)
    lab.submit("another", PROMPT, Task(DIGEST, 2))
    lab.submit("first", PROMPT, Task(DIGEST, 0))
    lab.run()
    assert "`task_id` is required" in str(lab.ending("none").error)
    assert str(lab.ending("another").error) == "task_id: 2 is none of the adapter's 2 tasks, 0 to 1"
    assert lab.finished("first")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_transformer_submodules=2),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_transformer_submodules=2, encoder_hidden_size=8),
    ],
    ids=["prompt_tuning", "p_tuning"],
)
def test_a_prompt_for_two_submodules_is_as_long_as_peft_makes_it(name, config, models, tmp_path):
    saved = Saved(models[name], copy.deepcopy(config), tmp_path)
    lab = lab_of(models[name], saved)
    assert lab.adapters[DIGEST].prefix.length == 6
    lab.submit("a", PROMPT, DIGEST)
    lab.run()
    assert lab.tokens("a") == saved.tokens()


def test_a_cpt_prompt_gives_pefts_tokens(models, tmp_path):
    saved = Saved(models["llama"], copy.deepcopy(CONFIGS["cpt"]), tmp_path)
    lab = lab_of(models["llama"], saved)
    lab.submit("a", PROMPT, DIGEST)
    lab.run()
    assert lab.tokens("a") == saved.tokens()


# -- multitask prompts that do not fit -------------------------------------------------------------------------------


def multitask(**changed: Tensor | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor | None] = {
        "prompt_embeddings": torch.ones(4, 12),
        "prefix_task_cols": torch.ones(3, 4, 2),
        "prefix_task_rows": torch.ones(3, 2, 12),
        **changed,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (multitask(), {"num_tasks": 4}, r"num_tasks: is 4, but 3 is needed here \(prefix_task_cols\)"),
        (multitask(), {"num_ranks": 1}, r"num_ranks: is 1, but 2 is needed here \(prefix_task_cols\)"),
        (multitask(), {"num_virtual_tokens": 3}, "num_virtual_tokens: is 3, but 4 is needed"),
        (multitask(prefix_task_cols=None), {}, "prefix_task_cols: is missing"),
        (multitask(prefix_task_rows=None), {}, "prefix_task_rows: is missing"),
        (multitask(prompt_embeddings=None), {}, "prompt_embeddings: is missing"),
        (multitask(prefix_task_cols=torch.ones(3, 4)), {}, "prefix_task_cols: has 2 dimensions"),
        (multitask(prefix_task_cols=torch.ones(3, 5, 2)), {}, r"prefix_task_cols: has shape \[3, 5, 2\]"),
        (multitask(prefix_task_rows=torch.ones(2, 2, 12)), {}, r"prefix_task_rows: has shape \[2, 2, 12\]"),
        (multitask(prefix_task_rows=torch.ones(3, 2, 13)), {}, r"prefix_task_rows: has shape \[3, 2, 13\]"),
        (multitask(), {"num_transformer_submodules": 3}, "num_transformer_submodules: is 3, but prompt_embeddings has 4 rows"),
    ],
)
def test_a_multitask_checkpoint_that_does_not_fit_is_refused_by_name(tensors, config, message):
    base = BaseShape(Digest("0" * 64), "tiny", 12, 2, 4, 2, 3, 9, 32, {})
    with pytest.raises(AdapterError, match=f"^{message}"):
        METHODS["multitask_prompt_tuning"].read(Checkpoint("m", config, loose=tensors), base, Limits())


@pytest.mark.parametrize("task", [-1, 2, 1 << 70])
def test_a_task_that_is_not_there_is_refused(task):
    prefix = Prefix(2, embeddings=torch.ones(2, 4), factors=(torch.ones(2, 2, 1), torch.ones(2, 1, 4)))
    with pytest.raises(AdapterError, match=r"^task_id: .* is none of the adapter's 2 tasks, 0 to 1"):
        prefix.for_task(task)
    with pytest.raises(AdapterError, match=r"^task_id: the adapter has no tasks"):
        Prefix(2, embeddings=torch.ones(2, 4)).for_task(0)


def test_a_task_is_the_shared_prompt_times_its_own_matrix():
    embeddings, columns, rows = torch.randn(2, 4), torch.randn(3, 2, 5).bfloat16(), torch.randn(3, 5, 4)
    part = Part("m", prefix=Prefix(2, embeddings=embeddings, factors=(columns, rows), positions=0))
    picked = part.prefix.for_task(1)
    torch.testing.assert_close(picked.embeddings, embeddings * (columns[1].float() @ rows[1]))
    assert (picked.tasks, picked.length, picked.positions) == (0, 2, 0)
