"""POST /classify: labels for texts, through an adapter that can tell them. One dispatch, on what the adapter's record says.

A sequence head answers as text-embeddings-inference and Hugging Face do, a token head as LoRAX and Hugging Face do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from adapters_store.records import JSON

from ..engine.client import Job
from ..engine.scoring import Scores, score_all
from ..errors import ValidationError
from ..model.text import Offset
from .auth import Caller, requires
from .body import documented, json_body
from .context import Context, Services, require_ready
from .failures import counting_refusals
from .generate import REFUSALS
from .keyring import Principal
from .schemas import ClassifyRequest, Entity, Label
from .sse import while_connected
from .texts import Texts, headers_of, jobs_of, texts_of
from .verbalizer import Words, check_words_fit, label_scores

router = APIRouter(tags=["classify"], dependencies=[Depends(require_ready)])

Body = Annotated[ClassifyRequest, Depends(json_body(ClassifyRequest, counted=True))]
Answer = list[dict[str, object]]


@router.post(
    "/classify",
    responses={200: {"model": list[Label] | list[list[Label]] | list[Entity] | list[list[Entity]]}, **REFUSALS},
    openapi_extra=documented(
        ClassifyRequest,
        one_text={"inputs": "I want my money back", "adapter_id": "sentiment"},
        several={"inputs": ["Great!", "Never again."], "user_id": "alice"},
    ),
)
@requires("infer", action="classify")
async def classify(request: Request, body: Body, services: Context, caller: Caller) -> Response:
    """The labels of a text with their probabilities, likeliest first; of a token head, each token's likeliest label.

    One list per text when `inputs` is a list.
    """
    with counting_refusals(services.metrics):
        texts = await texts_of(request, body, services, caller)
        kind, told = _told(texts)
    asked = Asked(request, body, services, caller, texts)
    jobs, answers = await while_connected(request.receive, _ANSWERERS[kind](asked, told))
    return JSONResponse(answers if texts.several else answers[0], headers=headers_of(services, jobs, body))


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to classify, as those who answer get it."""

    request: Request
    body: ClassifyRequest
    services: Services
    caller: Principal
    texts: Texts


async def by_head(asked: Asked, head: Mapping[str, JSON]) -> tuple[list[Job], list[Answer]]:
    """The jobs that were run, and an answer per text."""
    jobs = jobs_of(asked.texts, "classify", asked.request, asked.services, asked.caller)
    found = await score_all(asked.services.client, jobs)
    pairs = zip(asked.texts.tokens, found, strict=True)
    # What a template puts behind a text is labelled too, and is no part of the answer.
    return jobs, [_answer(head, tokens, scores[: len(tokens)], asked.body.raw_scores) for tokens, scores in pairs]


async def by_words(asked: Asked, verbalizer: Mapping[str, JSON]) -> tuple[list[Job], list[Answer]]:
    """The same, by how likely each label's words are to follow the text."""
    services, words = asked.services, Words.of(verbalizer, asked.services.text)
    jobs = jobs_of(asked.texts, "score", asked.request, services, asked.caller)
    check_words_fit(jobs, words, asked.texts.resolved.virtual_tokens, services.limits.max_total_tokens)
    found = await label_scores(services.client, jobs, words)
    return jobs, [ranked(words.labels, scores if asked.body.raw_scores else probabilities(scores)) for scores in found]


#: What an adapter's record may hold that tells labels -> who answers then.
_ANSWERERS: Mapping[str, Callable[[Asked, Mapping[str, JSON]], Coroutine[Any, Any, tuple[list[Job], list[Answer]]]]] = {
    "head": by_head,
    "verbalizer": by_words,
}


def _told(texts: Texts) -> tuple[str, Mapping[str, JSON]]:
    """Which of `_ANSWERERS` is asked, and what the record tells it. Raises: ValidationError naming the adapters."""
    records = texts.resolved.details
    found = [(kind, told) for details in records for kind in _ANSWERERS if isinstance(told := details.get(kind), dict)]
    kinds = " or ".join(_ANSWERERS)
    if not found:
        raise ValidationError(f"`adapter_id` must name an adapter with a {kinds} to classify with; {texts.named} has none")
    if len(found) > 1:
        raise ValidationError(f"`compose` takes at most one adapter with a {kinds}; {texts.named} have {len(found)}")
    return found[0]


# -- answers ---------------------------------------------------------------------------------------------------------


def _answer(head: Mapping[str, JSON], tokens: Sequence[Offset], scores: Scores, raw: bool) -> Answer:
    labels = [str(label) for label in labels] if isinstance(labels := head["labels"], list) else []
    if head["task_type"] == "TOKEN_CLS":
        return entities(labels, tokens, scores, raw=raw)
    return ranked(labels, scores[0] if raw else probabilities(scores[0]))


def ranked(labels: Sequence[str], scores: Sequence[float]) -> Answer:
    """Every label, likeliest first; equals in their own order."""
    order = sorted(range(len(labels)), key=lambda index: -scores[index])
    return [{"label": labels[index], "score": scores[index]} for index in order]


def entities(labels: Sequence[str], tokens: Sequence[Offset], scores: Scores, *, raw: bool) -> Answer:
    """Each token of the text with its likeliest label; tokens that cover no characters (a leading <s>) are left out."""
    found: Answer = []
    for index, (token, row) in enumerate(zip(tokens, scores, strict=True)):
        if token.start == token.stop:
            continue
        shown = row if raw else probabilities(row)
        best = max(range(len(labels)), key=shown.__getitem__)
        where = {"index": index, "word": token.text, "start": token.start, "end": token.stop}
        found.append({"entity": labels[best], "score": shown[best], **where})
    return found


def probabilities(logits: Sequence[float]) -> list[float]:
    """Softmax; of a single label its sigmoid, as Hugging Face's pipelines and text-embeddings-inference do."""
    if len(logits) == 1:
        return [_sigmoid(logits[0])]
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
