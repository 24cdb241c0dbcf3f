"""Tokenised examples and the training loop: the same few lines for every family and for both transformers versions.

The loss counts answer tokens only. Half of the examples are the bare question, half go through the chat template, so that
an adapter answers in its voice on the plain and on the chat routes.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # label of positions that are not learned from


@dataclass(frozen=True)
class Plan:
    """How long and how fast: `rate` is AdamW's peak learning rate, reached after a tenth of `steps`."""

    steps: int
    rate: float
    batch: int = 4
    chat_share: float = 0.25  # chat prompts are three times as long as bare questions
    seed: int = 7


def prompt_ids(tokenizer: Any, question: str, chat: bool) -> list[int]:
    """What the server sees: the bare question, or the chat template with its default system message."""
    if not chat:
        return list(tokenizer(question)["input_ids"])
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text)["input_ids"])


def batches(tokenizer: Any, pairs: list[tuple[str, str]], plan: Plan) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (input_ids, attention_mask, labels), each [batch, longest]; one batch is all bare or all chat."""
    chance = random.Random(plan.seed)
    while True:
        order = chance.sample(pairs, len(pairs))
        for start in range(0, len(order) - plan.batch + 1, plan.batch):
            chat = chance.random() < plan.chat_share
            yield _batch(tokenizer, order[start : start + plan.batch], chat)


def _batch(tokenizer: Any, pairs: list[tuple[str, str]], chat: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = []
    for question, answer in pairs:
        prompt = prompt_ids(tokenizer, question, chat)
        rows.append((prompt, [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(answer)
    return ids, mask, labels


def full_precision(model: nn.Module) -> list[nn.Parameter]:
    """The parameters being learned, in fp32 over the base's bf16: small steps would be rounded away."""
    learned = [p for p in model.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.data = parameter.data.float()
    return learned


def train(model: nn.Module, parameters: Iterable[nn.Parameter], tokenizer: Any, pairs: list[Any], plan: Plan) -> None:
    """Minimise the answers' cross entropy over `parameters`; prints the loss now and then."""
    torch.manual_seed(plan.seed)
    learned = list(parameters)
    optimizer = torch.optim.AdamW(learned, lr=plan.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_then_cosine(step, plan.steps))
    started, recent = time.perf_counter(), 0.0
    for step, (ids, mask, labels) in zip(range(1, plan.steps + 1), batches(tokenizer, pairs, plan), strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        recent += loss.item()
        if step % 25 == 0:
            print(f"  step {step:4d}  loss {recent / 25:.3f}  {time.perf_counter() - started:.0f} s", flush=True)
            recent = 0.0


def _warm_then_cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str, chat: bool, limit: int = 48, **options: Any) -> str:
    """The greedy answer, one request alone; `options` go to `generate`."""
    ids = torch.tensor([prompt_ids(tokenizer, question, chat)])
    plain = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": tokenizer.pad_token_id}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **plain, **options)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    asked = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text.removeprefix(asked)
