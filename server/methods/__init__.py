"""METHODS: every PEFT family that is served, by name. A new family is one file here and one line below.

`METHODS` reads uploads; an engine with native kernels builds its own table with `build_methods`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .base import Method
from .bitfit import BitFit
from .bottleneck import Bottleneck
from .bottleneck import Kernel as BottleneckKernel
from .discrete_prompt import DiscretePrompt
from .dora import Dora
from .full import Full
from .heads import Heads
from .ia3 import IA3
from .ln_tuning import LnTuning
from .lora import Kernel, Lora
from .maps import MakeLinear
from .prefix_tuning import PrefixTuning
from .prompt_tuning import CPT, MultitaskPromptTuning, PromptTuning, PTuning
from .trainable_tokens import TrainableTokens


def build_methods(
    kernel: Kernel | None = None, linear: MakeLinear | None = None, bottleneck: BottleneckKernel | None = None
) -> Mapping[str, Method]:
    """The families; where they are given, `kernel` does LoRA's products, `linear` whole matrices', `bottleneck` theirs."""
    families: tuple[Method, ...] = (
        Lora(kernel),
        Dora(kernel),
        IA3(),
        BitFit(),
        LnTuning(),
        Full(linear),
        TrainableTokens(linear),
        Bottleneck(bottleneck),
        PrefixTuning(),
        PromptTuning(),
        PTuning(),
        CPT(),
        MultitaskPromptTuning(),
        DiscretePrompt(),
        Heads(),
    )
    return MappingProxyType({family.name: family for family in families})


METHODS: Mapping[str, Method] = build_methods()
