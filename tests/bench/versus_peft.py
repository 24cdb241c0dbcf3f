"""The engine against PEFT's `generate(adapter_names=...)`, both in this process, interleaved. Run it by hand:

    python -m tests.bench.versus_peft [ROUNDS]

Same base (fp32 arithmetic on both sides), same 8 LoRA adapters (r=16 on every linear layer, weights of bf16 precision like
the base's), same 8 prompts of 128 random tokens, 64 new tokens each, greedy. Prints tokens/s of each round and the ratio;
`adapterd bench --versus-peft` is the same over HTTP, with a client on the same cores.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from server.bench.inprocess import EngineUnderTest
from server.model.pull import resolve
from server.settings import default_home

ROWS, PROMPT, NEW, RANK = 8, 128, 64, 16


class Theirs:
    """PEFT with all adapters loaded, one per row."""

    def __init__(self, directory: Path, folder: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = peft.get_peft_model(base, config, adapter_name="a0").eval()
        generator = torch.Generator().manual_seed(0)
        for row in range(1, ROWS):
            self.model.add_adapter(f"a{row}", config)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.02).bfloat16())
        self.model.save_pretrained(str(folder))

    def generate(self, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
        ids = torch.tensor(prompts)
        begun = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                adapter_names=[f"a{row}" for row in range(ROWS)],
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        return ROWS * NEW / (time.perf_counter() - begun), out[:, PROMPT:].tolist()


def main(rounds: int) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    directory = resolve("smollm2-135m-instruct", default_home())
    with tempfile.TemporaryDirectory() as temporary:
        theirs = Theirs(directory, Path(temporary))
        ours = EngineUnderTest.load(directory, rows=ROWS, tokens=PROMPT + NEW)
        folders = {f"a{row}": Path(temporary) / f"a{row}" for row in range(ROWS)}
        ours.add({name: {path.name: path.read_bytes() for path in at.iterdir()} for name, at in folders.items()})
    with ours:
        compare(ours, theirs, list(folders), rounds)


def compare(ours: EngineUnderTest, theirs: Theirs, names: Sequence[str], rounds: int) -> None:
    generator = torch.Generator().manual_seed(1)
    ours.generate(torch.randint(5, 40_000, (ROWS, PROMPT), generator=generator).tolist(), names, new=2)
    print(f"kernels: {ours.kernels}\nround  base  8 LoRA  PEFT  LoRA/base  LoRA/PEFT  same tokens")
    ratios = []
    for number in range(rounds):
        prompts: list[list[int]] = torch.randint(5, 40_000, (ROWS, PROMPT), generator=generator).tolist()
        plain = ours.generate(prompts, [None] * ROWS, NEW).tokens_per_second
        batch = ours.generate(prompts, names, NEW)
        lora, mine = batch.tokens_per_second, [list(row) for row in batch.tokens]
        reference, expected = theirs.generate(prompts)
        ratios.append((lora / plain, lora / reference))
        same = sum(a == b for a, b in zip(mine, expected, strict=True))
        print(
            f"{number:5} {plain:5.1f} {lora:7.1f} {reference:5.1f} {ratios[-1][0]:10.2f} {ratios[-1][1]:10.2f} {same:6}/{ROWS}"
        )
    against_base, against_peft = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"median LoRA/base {against_base:.2f}, LoRA/PEFT {against_peft:.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
