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
import threading
import time
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

from adapters_store.digest import Digest
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.residency import Residency
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.methods import build_methods
from server.methods.base import Adapter, Limits
from server.methods.read import read_adapter
from server.metrics import Metrics
from server.model.kernels import choose_kernels
from server.model.loader import Base, load_base
from server.model.pull import resolve
from server.model.runner import CacheShape, Runner
from server.requests import Event, Request, Sampling
from server.settings import default_home

ROWS, PROMPT, NEW, RANK = 8, 128, 64, 16


class Ours:
    """The engine with its own thread; `generate` runs one batch to its end."""

    def __init__(self, base: Base, runner: Runner, adapters: dict[Digest, Adapter]) -> None:
        limits = SchedulerLimits(512, ROWS, ROWS, 2048)
        scheduler = Scheduler(Pages(257, 16), Residency(ROWS), limits, base.shape.digest, base.eos)
        self.engine = Engine(runner, scheduler, adapters.__getitem__, Metrics("bench"), self._take)
        self.digests = list(adapters)
        self.tokens: dict[str, list[int]] = {}
        self.left = 0
        self.done = threading.Event()
        self.engine.start()
        self.round = 0

    def _take(self, events: list[Event]) -> None:
        for event in events:
            self.tokens.setdefault(event.request_id, []).extend(token.id for token in event.tokens)
            self.left -= event.finish is not None
        if not self.left:
            self.done.set()

    def generate(self, prompts: list[list[int]], lora: bool, new: int = NEW) -> tuple[float, list[list[int]]]:
        """-> (tokens per second, tokens of each row)."""
        self.left, self.round = ROWS, self.round + 1
        self.done.clear()
        begun = time.perf_counter()
        for row, prompt in enumerate(prompts):
            adapters = (self.digests[row],) if lora else ()
            sampling = Sampling(new, ignore_eos=True)
            # A tenant of its own per round: nothing may come from the prefix cache.
            self.engine.submit(Request(f"{self.round}/{row}", str(self.round), adapters, tuple(prompt), sampling, begun))
        self.done.wait()
        seconds = time.perf_counter() - begun
        return ROWS * new / seconds, [self.tokens[f"{self.round}/{row}"] for row in range(ROWS)]


class Theirs:
    """PEFT with all adapters loaded, one per row."""

    def __init__(self, directory: Path, folder: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(base, config, adapter_name="a0").eval()
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
        kernels = choose_kernels(torch.device("cpu"), torch.float32, True, default_home(), print)
        base = load_base(directory, torch.device("cpu"), torch.float32, kernels.prepare)
        adapters = {}
        for row in range(ROWS):
            paths = {path.name: path for path in (Path(temporary) / f"a{row}").iterdir()}
            digest = Digest.of(str(row).encode())
            adapters[digest] = read_adapter(paths, base.shape, Limits(), digest)
    runner = Runner(base, CacheShape(257, 16), build_methods(kernels.lora, kernels.linear), kernels.attention, kernels.write)
    ours = Ours(base, runner, adapters)
    generator = torch.Generator().manual_seed(1)
    ours.generate(torch.randint(5, 40_000, (ROWS, PROMPT), generator=generator).tolist(), lora=True, new=2)
    print(f"kernels: {kernels.name}\nround  base  8 LoRA  PEFT  LoRA/base  LoRA/PEFT  same tokens")
    ratios = []
    for number in range(rounds):
        prompts: list[list[int]] = torch.randint(5, 40_000, (ROWS, PROMPT), generator=generator).tolist()
        plain, _ = ours.generate(prompts, lora=False)
        lora, mine = ours.generate(prompts, lora=True)
        reference, expected = theirs.generate(prompts)
        ratios.append((lora / plain, lora / reference))
        same = sum(a == b for a, b in zip(mine, expected, strict=True))
        print(
            f"{number:5} {plain:5.1f} {lora:7.1f} {reference:5.1f} {ratios[-1][0]:10.2f} {ratios[-1][1]:10.2f} {same:6}/{ROWS}"
        )
    against_base, against_peft = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"median LoRA/base {against_base:.2f}, LoRA/PEFT {against_peft:.2f}")
    ours.engine.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
