"""Classifiers over the tiny decoders, wrapped and saved by PEFT: the oracle of everything that reads hidden states."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from adapters_store.digest import Digest
from server.methods.base import Adapter, BaseShape, Limits
from server.methods.read import read_adapter
from tests.tiny import tiny_model

LABELS = 3
_CLASSES: Mapping[str, Any] = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}


class Classifier:
    """A PEFT adapter with a classifier for one task, its weights drawn as if trained, saved to `folder`."""

    def __init__(self, architecture: str, config: peft.PeftConfig, folder: Path) -> None:
        decoder = tiny_model(architecture)
        decoder.config.num_labels = LABELS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(7)
            model = _CLASSES[str(config.task_type)].from_config(decoder.config)
            model.base_model.load_state_dict(decoder.base_model.state_dict())
            self.oracle = peft.get_peft_model(model, config).eval()
            for name, parameter in self.oracle.named_parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(mean=1.0 if "ia3" in name else 0.0, std=0.3)
            self.oracle.save_pretrained(str(folder))
        self.folder = folder

    def adapter(self, base: BaseShape) -> Adapter:
        paths = {path.name: path for path in self.folder.iterdir()}
        return read_adapter(paths, base, Limits(), Digest.of(str(self.folder).encode()))

    @torch.no_grad()
    def logits(self, prompt: list[int]) -> Tensor:
        """[rows, LABELS]: one row, or one per token of the prompt. PEFT scores the virtual tokens too; those are left out."""
        ids = torch.tensor([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits: Tensor = self.oracle(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits if logits.ndim == 2 else logits[0, -len(prompt) :]
