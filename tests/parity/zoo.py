"""A zoo: many adapters of one tiny base with what each should answer alone, and the lab they are tried in together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from adapters_store.digest import Digest
from server.methods.base import Adapter, BaseShape
from server.model.loader import make_base
from tests.lab import BASE, Lab
from tests.parity.configs import CONFIGS
from tests.parity.places import PLACES
from tests.parity.specimens import Specimen, base_logits, bitfit_specimen, bottleneck_specimen, peft_specimen
from tests.tiny import VOCAB, tiny_model

NEW = 8
TRAINED = [3, 5]  # ids whose rows the configurations that train rows of the embedding train
#: Served, but defined by no library that runs every architecture.
OWN = ("bitfit", "bottleneck", "bottleneck_parallel")


@dataclass(frozen=True)
class Expected:
    """One prompt and what the oracle makes of it alone."""

    prompt: list[int]
    tokens: list[int]
    logits: Tensor  # [NEW, V], what the tokens were picked from


@dataclass
class Zoo:
    """The specimens of one architecture; the name "base" stands for no adapter at all."""

    architecture: str
    specimens: Mapping[str, Specimen]
    _expected: dict[str, Expected] = field(default_factory=dict)

    @property
    def adapters(self) -> dict[Digest, Adapter]:
        return {specimen.digest: specimen.adapter for specimen in self.specimens.values()}

    @cached_property
    def expected(self) -> dict[str, Expected]:
        """By name, prompts of many lengths."""
        generator = torch.Generator().manual_seed(1)
        found = {}
        for i, name in enumerate(["base", *self.specimens]):
            prompt = [*TRAINED, *torch.randint(3, VOCAB, (1 + 5 * i % 37,), generator=generator).tolist()]
            found[name] = Expected(prompt, *self._specimen(name).greedy(prompt, NEW))
        return found

    def _specimen(self, name: str) -> Specimen:
        if name != "base":
            return self.specimens[name]
        return Specimen("base", Adapter(BASE, ()), base_logits(tiny_model(self.architecture)))

    def lab(self, more: Mapping[Digest, Adapter] | None = None, **options: object) -> Lab:
        return Lab(tiny_model(self.architecture), {**self.adapters, **(more or {})}, **options)  # type: ignore[arg-type]

    def submit(self, lab: Lab, name: str, suffix: str = "") -> None:
        digests = () if name == "base" else (self.specimens[name].digest,)
        lab.submit(name + suffix, self.expected[name].prompt, *digests, max_new_tokens=NEW)

    def check(self, lab: Lab, suffix: str = "") -> None:
        """Everyone got the oracle's tokens, and its logits within 1e-3."""
        wrong = {name: self._difference(lab, name, suffix) for name in self.expected}
        assert {name: why for name, why in wrong.items() if why} == {}

    def _difference(self, lab: Lab, name: str, suffix: str) -> str:
        expected, tokens = self.expected[name], lab.tokens(name + suffix)
        if tokens != expected.tokens:
            return f"{tokens} instead of {expected.tokens} ({lab.ending(name + suffix).error})"
        error = float((lab.logits(name + suffix)[-NEW:] - expected.logits).abs().max())
        return "" if error < 1e-3 else f"logits differ by {error:.2g}"


def make_zoo(architecture: str, names: Iterable[str], home: Path) -> Zoo:
    """Every named configuration (of `CONFIGS` or `OWN`), written below `home`."""
    torch.set_num_threads(1)
    model = tiny_model(architecture)
    base = make_base(tiny_model(architecture), BASE, torch.device("cpu"), torch.float32).shape

    def make(name: str) -> Specimen:
        if name == "bitfit":
            return bitfit_specimen(model, base, home / name)
        if name in OWN:
            return bottleneck_specimen(model, base, parallel=name == "bottleneck_parallel")
        return peft_specimen(name, CONFIGS[name], architecture, model, base, home / name)

    return Zoo(architecture, {name: make(name) for name in names if _exists(name, architecture, base)})


def _exists(name: str, architecture: str, base: BaseShape) -> bool:
    """Bottlenecks need a base whose layout is known, a configuration what it names."""
    if name in CONFIGS:
        return CONFIGS[name].on(PLACES[architecture])
    return not name.startswith("bottleneck") or bool(base.sublayers)
