"""AdapterHub's files for double_seq_bn or par_bn, and the library's published formula by hooks.

That library cannot be installed beside this transformers; tests/golden holds what it computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

Files = Mapping[str, bytes]


@contextmanager
def wearing_bottlenecks(llama: Any, parallel: bool, strength: float, random: torch.Generator) -> Iterator[Files]:
    """Inside, a llama with a language model's head answers through the adapters whose files these are."""
    hidden, width = llama.config.hidden_size, llama.config.hidden_size // 8
    tensors: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for index, layer in enumerate(llama.model.layers):
            places = [("output_adapters", layer.post_attention_layernorm, layer.mlp.down_proj)]
            if not parallel:
                places.insert(0, ("attention_adapters", layer.input_layernorm, layer.self_attn.o_proj))
            for place, norm, exit_ in places:
                site = _site(hidden, width, strength, random)
                path = f"model.layers.{index}.{place}.adapters.fleet"
                tensors |= {f"{path}.{name}": tensor for name, tensor in site.items()}
                for handle in _hook(site, norm, exit_, parallel):
                    hooks.callback(handle.remove)
        config = {"config": _PAR_BN if parallel else _DOUBLE_SEQ_BN, **_INTERFACE, "hidden_size": hidden}
        yield {"adapter_config.json": json.dumps(config).encode(), "adapter.safetensors": save(tensors)}


def _site(hidden: int, width: int, strength: float, random: torch.Generator) -> dict[str, Tensor]:
    shapes = {
        "adapter_down.0.weight": (width, hidden),
        "adapter_down.0.bias": (width,),
        "adapter_up.weight": (hidden, width),
        "adapter_up.bias": (hidden,),
    }
    return {name: torch.randn(*shape, generator=random) * strength for name, shape in shapes.items()}


def _hook(site: Mapping[str, Tensor], norm: nn.Module, exit_: nn.Module, parallel: bool) -> Iterator[Any]:
    """y + up(silu(down(y))) after a sublayer, or y + 4 up(relu(down(x))) where x is what the sublayer's norm reads."""
    seen: list[Tensor] = []
    down, up = (
        lambda x: nn.functional.linear(x, site["adapter_down.0.weight"], site["adapter_down.0.bias"]),
        lambda x: nn.functional.linear(x, site["adapter_up.weight"], site["adapter_up.bias"]),
    )

    def formula(module: nn.Module, args: object, y: Tensor) -> Tensor:
        if parallel:
            return y + 4 * up(torch.relu(down(seen.pop())))
        return y + up(nn.functional.silu(down(y)))

    if parallel:
        yield norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    yield exit_.register_forward_hook(formula)


_DOUBLE_SEQ_BN: Mapping[str, object] = {
    "mh_adapter": True,
    "output_adapter": True,
    "reduction_factor": 8,
    "non_linearity": "swish",
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "scaling": 1.0,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
}
_PAR_BN: Mapping[str, object] = {
    **_DOUBLE_SEQ_BN,
    "mh_adapter": False,
    "non_linearity": "relu",
    "is_parallel": True,
    "scaling": 4.0,
}
_INTERFACE: Mapping[str, object] = {
    "model_class": "LlamaForCausalLM",
    "model_name": "",
    "model_type": "llama",
    "name": "fleet",
    "version": "adapters.1.3.0",
}
