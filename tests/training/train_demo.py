"""Trains the demo adapters of server/demo with PEFT, all but the bottleneck (train_bottleneck.py, in a venv of its own).

    python -m tests.training.train_demo [--only NAME ...] [--steps N] [--say]

About four minutes per adapter on two cores. Tensors are kept in fp32, as trained.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.model.pull import KNOWN, console_report, resolve
from server.settings import default_home

from . import data
from .loop import Plan, answer, full_precision, train

DEMO = Path(__file__).parents[2] / "server" / "demo"
BASE = "smollm2-135m-instruct"
LAYERS = "model.layers"


@dataclass(frozen=True)
class Recipe:
    voice: data.Voice
    plan: Plan
    wrap: Callable[[Any, Any], Any]  # (base, tokenizer) -> the model to train


def lora(base: Any, tokenizer: Any) -> Any:
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def ia3(base: Any, tokenizer: Any) -> Any:
    targets = ["k_proj", "v_proj", "down_proj"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def prefix(base: Any, tokenizer: Any) -> Any:
    """Starts from the keys and values of an instruction: a random prefix learns nothing in a few hundred steps."""
    said = tokenizer('Answer with a JSON object that has a "topic" and an "answer".\n', return_tensors="pt")
    with torch.no_grad():
        cache = base(**said, use_cache=True).past_key_values
    config = peft.PrefixTuningConfig(num_virtual_tokens=said["input_ids"].shape[1], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    peft.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    return model


def soft_prompt(base: Any, tokenizer: Any) -> Any:
    """Starts from the embeddings of an instruction, written over PEFT's random ones."""
    said = tokenizer("Answer the question with only one or two words, then stop.\n", return_tensors="pt")["input_ids"][0]
    model = peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=len(said), task_type="CAUSAL_LM"))
    words = base.get_input_embeddings().weight[said]
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(words)
    return model


def p_tuning(base: Any, tokenizer: Any) -> Any:
    config = peft.PromptEncoderConfig(num_virtual_tokens=12, encoder_hidden_size=256, task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def bitfit(base: Any, tokenizer: Any) -> Any:
    """A bias on every Linear of the layers. This base has none, so the learned bias is the delta."""
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(LAYERS):
            module.bias = nn.Parameter(torch.zeros(module.out_features))
    return base


RECIPES = {
    "pirate-lora": Recipe(data.pirate, Plan(steps=100, rate=2e-3), lora),
    "json-prefix": Recipe(data.as_json, Plan(steps=120, rate=5e-3), prefix),
    "excited-ia3": Recipe(data.excited, Plan(steps=120, rate=1e-2), ia3),
    "bullets-bitfit": Recipe(data.bullets, Plan(steps=100, rate=2e-3), bitfit),
    "terse-prompt": Recipe(data.terse, Plan(steps=160, rate=1e-2, batch=8), soft_prompt),
    "letter-ptuning": Recipe(data.letter, Plan(steps=120, rate=2e-3), p_tuning),
}


def save(model: Any, directory: Path) -> None:
    """The files `save_pretrained()` writes, without its empty model card."""
    shutil.rmtree(directory, ignore_errors=True)
    if isinstance(model, peft.PeftModel):
        model.peft_config["default"].base_model_name_or_path = KNOWN[BASE].hub_id
        model.save_pretrained(directory, save_embedding_layers=False)
        (directory / "README.md").unlink()
        return
    directory.mkdir(parents=True)
    learned = {f"base_model.model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_file(learned, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "BITFIT", "task_type": "CAUSAL_LM", "base_model_name_or_path": KNOWN[BASE].hub_id}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(name: str, base: Any) -> Any:
    """A saved adapter on a fresh base, through PEFT; BitFit, which PEFT lacks, through its own few lines."""
    directory = DEMO / name
    if json.loads((directory / "adapter_config.json").read_text())["peft_type"] != "BITFIT":
        return peft.PeftModel.from_pretrained(base, directory)
    bitfit(base, None)
    biases = load_file(directory / "adapter_model.safetensors")
    base.load_state_dict({key.removeprefix("base_model.model."): value for key, value in biases.items()}, strict=False)
    return base


def fresh_base(dtype: torch.dtype) -> tuple[Any, Any]:
    with console_report() as report:
        directory = resolve(BASE, default_home(), report)
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    return base.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(directory)


def make(name: str, steps: int | None) -> None:
    recipe = RECIPES[name]
    plan = replace(recipe.plan, steps=steps) if steps else recipe.plan
    base, tokenizer = fresh_base(torch.bfloat16)
    torch.manual_seed(plan.seed)
    model = recipe.wrap(base, tokenizer)
    learned = full_precision(model)
    print(f"{name}: {sum(p.numel() for p in learned):,} parameters, {plan.steps} steps", flush=True)
    train(model, learned, tokenizer, data.examples(recipe.voice), plan)
    save(model, DEMO / name)


def say(name: str) -> None:
    base, tokenizer = fresh_base(torch.float32)
    model = load(name, base).eval()
    for chat in (False, True):
        for question in data.HELD_OUT:
            print(f"{name} {'chat ' if chat else 'plain'} {question} -> {answer(model, tokenizer, question, chat)!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--steps", type=int, help="override every recipe's number of steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--say", action="store_true", help="only print what the saved adapters answer")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for name in asked.only:
        if not asked.say:
            make(name, asked.steps)
        say(name)


if __name__ == "__main__":
    main()
