"""A prefix kept as a table, or as a table and the small network it goes through (Li and Liang, 2021), run once, at load.

Owns that arithmetic. Knows neither the base's layout nor the server's limits: `prefix_tuning` does.

    Checkpoint.loose = {"table": [N, e]}, with the network {"down": [b, e], "down_bias": [b], "up": [p, b], "up_bias": [p]}
    Checkpoint.config = {"activation": str} with the network;  p = layers * 2 * kv_heads * head_dim;  e = p without it
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .base import Checkpoint


def evaluate(checkpoint: Checkpoint) -> Tensor:
    """[N, p] fp32: up(act(down(table))), or the table itself where there is no network."""
    stored = {name: tensor.float() for name, tensor in checkpoint.loose.items()}
    if "down" not in stored:
        return stored["table"]
    activation = ACTIVATIONS[str(checkpoint.config["activation"])]
    hidden = activation(F.linear(stored["table"], stored["down"], stored["down_bias"]))
    return F.linear(hidden, stored["up"], stored["up_bias"])
