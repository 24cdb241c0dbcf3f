"""The activation table against transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from server.errors import AdapterError
from server.methods.activations import ACTIVATIONS, ALIASES, activation_of

#: Names that are ours or AdapterHub's.
OWN = {"gelu_tanh": torch.nn.GELU("tanh"), "leakyrelu": F.leaky_relu}


@pytest.mark.parametrize("name", [*ACTIVATIONS, *ALIASES])
def test_activations_are_transformers(name: str) -> None:
    x = torch.linspace(-12, 12, 301)
    theirs = OWN.get(name) or ACT2FN[name]
    assert torch.allclose(ACTIVATIONS[activation_of("non_linearity", name.upper())](x), theirs(x), atol=1e-5)


def test_every_name_has_one_meaning() -> None:
    assert not ACTIVATIONS.keys() & ALIASES.keys()
    assert set(ALIASES.values()) <= ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ["prelu", "xielu", "", "__import__", "x" * 1000])
def test_other_names_are_refused_with_the_field_and_what_is_served(name: str) -> None:
    with pytest.raises(AdapterError, match="supported: gelu") as caught:
        activation_of("config.non_linearity", name)
    assert caught.value.field == "config.non_linearity"
    assert len(str(caught.value)) < 500
