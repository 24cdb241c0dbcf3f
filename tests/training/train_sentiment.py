"""Makes the demo's two classifiers of server/demo: `sentiment-head` (trained) and `sentiment-prompt` (chosen).

    python -m tests.training.train_sentiment [--threads N] [--say]

Both start from the same passes of the frozen base: each template around each training line, and the final hidden state of
its last position. A head is a linear classifier of those states; a prompt asks which label's words the base would go on
with. Which template and how strong a weight decay is decided on training lines (the head's in folds); the held-out lines
are looked at once, to print the accuracy.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.model.pull import KNOWN
from server.model.text import Text

from .reviews import reviews
from .sentiment import HELD_OUT, LABELS, training_lines
from .train_demo import BASE, DEMO, fresh_base

HEAD, PROMPT = "sentiment-head", "sentiment-prompt"
TEMPLATES = (
    "{input}",
    "Review: {input}\nIt was",
    "Review: {input}\nSentiment:",
    "{input} All in all, it was",
    "Is this review positive or negative?\n{input}\nAnswer:",
)
WORDS: tuple[Mapping[str, Sequence[str]], ...] = (
    {"negative": (" negative",), "positive": (" positive",)},
    {"negative": (" bad",), "positive": (" good",)},
    {"negative": (" poor",), "positive": (" excellent",)},
    {"negative": (" terrible", " bad", " awful"), "positive": (" great", " good", " wonderful")},
    {"negative": (" disappointed", " angry"), "positive": (" pleased", " impressed")},
)
DECAYS = (0.003, 0.03, 0.3, 3.0)
FOLDS = 6
GENERATED = 64  # of the generated lines: more of them teach little, being made of the same few parts
Line = tuple[str, str]  # label, text


@dataclass(frozen=True)
class Passes:
    """What the base made of lines inside one template."""

    states: Tensor  # [n, H] final hidden state of each last position
    labels: Tensor  # [n] index into LABELS


class Base:
    """The frozen base in fp32, run on whole prompts of about one length at a time."""

    def __init__(self) -> None:
        self.model, tokenizer = fresh_base(torch.float32)
        self.text = Text(tokenizer)

    def ids(self, template: str, line: str) -> list[int]:
        """Piece by piece, as the server tokenises a template."""
        head, tail = template.split("{input}")
        pieces = [piece for piece in ((head, True), (line, not head), (tail, False)) if piece[0]]
        return [id for piece, first in pieces for id in self.text.encode_piece(piece, first)]

    @torch.no_grad()
    def passes(self, template: str, lines: Sequence[Line], batch: int = 16) -> Passes:
        """Padding stands behind the last position, which a causal model never sees."""
        prompts = [self.ids(template, line) for _, line in lines]
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        states = torch.empty(len(prompts), self.model.config.hidden_size)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            longest = len(prompts[part[-1]])
            ids = torch.tensor([prompts[at] + [0] * (longest - len(prompts[at])) for at in part])
            last = torch.tensor([len(prompts[at]) - 1 for at in part])
            states[part] = self.model.model(input_ids=ids).last_hidden_state[torch.arange(len(part)), last]
        return Passes(states, torch.tensor([LABELS.index(label) for label, _ in lines]))

    def label_scores(self, states: Tensor, words: Mapping[str, Sequence[str]]) -> Tensor:
        """states [n, H] -> [n, labels]: how likely each label's words come next. Words of one token."""
        ids = [[self._token(word) for word in words[label]] for label in LABELS]
        logits = states @ self.model.lm_head.weight.T
        return torch.stack([logits[:, own].logsumexp(-1) for own in ids], -1)

    def _token(self, word: str) -> int:
        (id,) = self.text.encode_piece(word, first=False)
        return id


def training_set() -> list[Line]:
    """The written lines, and as many generated ones as help."""
    return [*reviews(), *random.Random(3).sample(training_lines(), GENERATED)]


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(-1) == labels).float().mean())


def fitted(passes: Passes, decay: float) -> Tensor:
    """score.weight [labels, H] of a softmax classifier without a bias, as transformers' sequence classifiers have none.

    Each feature is scaled to its size first, so that the decay means the same to all of them.
    """
    scale = passes.states.square().mean(0).sqrt()
    scaled = passes.states / scale
    weight = torch.zeros(len(LABELS), scaled.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(scaled @ weight.T, passes.labels) + decay / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return (weight / scale).detach()


def cross_validated(passes: Passes, decay: float) -> float:
    """Accuracy over the written reviews, each judged by a head that has not seen it; lines come in pairs of labels."""
    written = len(reviews())
    right = 0.0
    for fold in range(FOLDS):
        held = torch.tensor([at < written and at // 2 % FOLDS == fold for at in range(len(passes.labels))])
        seen = Passes(passes.states[~held], passes.labels[~held])
        right += accuracy(passes.states[held] @ fitted(seen, decay).T, passes.labels[held]) * int(held.sum())
    return right / written


def choose_head(found: Mapping[str, Passes]) -> tuple[str, float]:
    """(template, decay) of the best accuracy in folds; of equals the stronger decay."""
    scores = {}
    for template, passes in found.items():
        for decay in DECAYS:
            scores[template, decay] = cross_validated(passes, decay)
            print(f"  head   {scores[template, decay]:.3f}  decay {decay:<5}  {template!r}", flush=True)
    return max(scores, key=lambda choice: (scores[choice], choice[1]))


def choose_prompt(base: Base, found: Mapping[str, Passes]) -> tuple[str, Mapping[str, Sequence[str]]]:
    """The template and words of the best accuracy on the training lines; of equals those that are surer."""
    choices = []
    for template, passes in found.items():
        for words in WORDS:
            scores = base.label_scores(passes.states, words)
            loss = float(F.cross_entropy(scores, passes.labels))
            choices.append((accuracy(scores, passes.labels), -loss, template, words))
            print(f"  prompt {choices[-1][0]:.3f}  loss {loss:.3f}  {template!r} {dict(words)}", flush=True)
    best = max(choices, key=lambda choice: choice[:2])
    return best[2], best[3]


def save_head(directory: Path, template: str, weight: Tensor) -> None:
    """Two parts: the template as a discrete prompt, and the head."""
    shutil.rmtree(directory, ignore_errors=True)
    _write(directory / "prompt", {"peft_type": "DISCRETE_PROMPT", "template": template})
    names = {str(index): label for index, label in enumerate(LABELS)}
    _write(directory / "head", {"peft_type": "HEAD", "task_type": "SEQ_CLS", "pooling": "last", "id2label": names})
    tensors = {"score.weight": weight.contiguous()}
    save_file(tensors, directory / "head" / "adapter_model.safetensors", metadata={"format": "pt"})


def save_prompt(directory: Path, template: str, words: Mapping[str, Sequence[str]]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    verbalizer = {label: list(words[label]) for label in LABELS}
    _write(directory, {"peft_type": "DISCRETE_PROMPT", "template": template, "verbalizer": verbalizer})


def _write(directory: Path, config: Mapping[str, object]) -> None:
    directory.mkdir(parents=True)
    stored = {**config, "base_model_name_or_path": KNOWN[BASE].hub_id}
    (directory / "adapter_config.json").write_text(json.dumps(stored, indent=2) + "\n")


def config_of(directory: Path) -> Any:
    return json.loads((directory / "adapter_config.json").read_text())


def head_scores(base: Base, lines: Sequence[Line]) -> Tensor:
    """Logits [n, labels] of the saved head."""
    passes = base.passes(config_of(DEMO / HEAD / "prompt")["template"], lines)
    return passes.states @ load_file(DEMO / HEAD / "head" / "adapter_model.safetensors")["score.weight"].T


def prompt_scores(base: Base, lines: Sequence[Line]) -> Tensor:
    """Log masses [n, labels] of the saved prompt's words."""
    config = config_of(DEMO / PROMPT)
    return base.label_scores(base.passes(config["template"], lines).states, config["verbalizer"])


def make(base: Base) -> None:
    lines = training_set()
    found: dict[str, Passes] = {}
    for template in TEMPLATES:
        found[template] = base.passes(template, lines)
        print(f"{len(lines)} training lines through {template!r}", flush=True)
    template, decay = choose_head(found)
    save_head(DEMO / HEAD, template, fitted(found[template], decay))
    save_prompt(DEMO / PROMPT, *choose_prompt(base, found))


def held_out(base: Base) -> Iterator[tuple[str, int]]:
    """(name, how many of the held-out lines it gets right) of what is saved."""
    labels = torch.tensor([LABELS.index(label) for label, _ in HELD_OUT])
    for name, scores in ((HEAD, head_scores), (PROMPT, prompt_scores)):
        yield name, int((scores(base, HELD_OUT).argmax(-1) == labels).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--say", action="store_true", help="only print how good the saved ones are")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    base = Base()
    if not asked.say:
        make(base)
    for name, right in held_out(base):
        print(f"{name}: {right} of {len(HELD_OUT)} held-out lines right, {right / len(HELD_OUT):.3f}", flush=True)


if __name__ == "__main__":
    main()
