"""Trains the demo's bottleneck adapter (AdapterHub's Pfeiffer layout) with the `adapters` library, in a venv of its own.

    <venv>/bin/python -m tests.training.train_bottleneck MODEL_DIRECTORY [--steps N] [--say]

`adapters` 1.3.0 needs transformers 4.57, which the server cannot share; README.md has the two lines that make the venv.
Imports nothing of the server; MODEL_DIRECTORY is what `adapterd pull smollm2-135m-instruct` prints.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapters
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from . import data
from .loop import Plan, answer, full_precision, train

NAME = "helpdesk-bottleneck"
DIRECTORY = Path(__file__).parents[2] / "server" / "demo" / NAME
PLAN = Plan(steps=70, rate=2e-3, batch=8)


def base_model(directory: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The base as transformers 5 wrote it, read by transformers 4: the RoPE base and the tokenizer class moved since."""
    config = AutoConfig.from_pretrained(directory)
    config.rope_theta = json.loads((directory / "config.json").read_text())["rope_parameters"]["rope_theta"]
    model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype, attn_implementation="eager")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = (directory / "chat_template.jinja").read_text()
    return model.requires_grad_(False).eval(), tokenizer


def make(directory: Path, steps: int) -> None:
    model, tokenizer = base_model(directory, torch.bfloat16)
    adapters.init(model)
    torch.manual_seed(PLAN.seed)
    model.add_adapter(NAME, config=adapters.SeqBnConfig(reduction_factor=64))
    model.train_adapter(NAME)
    model.eval()  # no dropout in this base; `train_adapter` switched the mode
    learned = full_precision(model)
    print(f"{NAME}: {sum(p.numel() for p in learned):,} parameters, {steps} steps", flush=True)
    train(model, learned, tokenizer, data.examples(data.help_desk), replace(PLAN, steps=steps))
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_adapter(str(DIRECTORY), NAME, with_head=False, use_safetensors=True)


def say(directory: Path) -> None:
    model, tokenizer = base_model(directory, torch.float32)
    adapters.init(model)
    model.set_active_adapters(model.load_adapter(str(DIRECTORY), with_head=False, use_safetensors=True))
    for chat in (False, True):
        for question in data.HELD_OUT:
            said = answer(model, tokenizer, question, chat, use_cache=False)  # 1.3.0 loses the cache of transformers 4.57
            print(f"{NAME} {'chat ' if chat else 'plain'} {question} -> {said!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=PLAN.steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--say", action="store_true", help="only print what the saved adapter answers")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if not asked.say:
        make(asked.model, asked.steps)
    say(asked.model)


if __name__ == "__main__":
    main()
