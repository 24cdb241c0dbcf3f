"""A scripted engine with a real thread, a tiny tokenizer made in code, and uploads: what the API tests run against."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adapters_store.digest import Digest
from adapters_store.records import JSON
from server.errors import AdapterdError, AdapterError
from server.metrics import EngineStats
from server.requests import Event, FinishReason, Request, Token
from server.step_times import StepTimes

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}<|start|>assistant"
)


def tiny_tokenizer(*, bos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few words: every string can be encoded, emoji take a token per byte."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True) for text in ("<s>", "</s>", "<|start|>", "<|end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, how are you today? the cat sat on the mat"] * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass
class _Running:
    request: Request
    script: list[int]
    made: int = 0


@dataclass
class FakeEngine:
    """One thread, one token per request and step, from `script(request)`; EOS when the script is at its end.

    `hold()` stops it between steps and `go()` lets it run; `cancelled` and `submitted` say what it was told.
    """

    publish: Callable[[list[Event]], None]
    script: Callable[[Request], list[int]]
    eos: int
    refusal: AdapterdError | None = None  # raised by the next submits
    failure: AdapterdError | None = None  # ends every request after `failure_after` tokens
    failure_after: int = 0
    silent: bool = False  # accept, and never answer
    pause_after: int = 0  # hold when a request has got this many tokens
    crash: Exception | None = None  # raised by residency, as a bug would
    scorer: Callable[[Request], tuple[tuple[float, ...], ...]] = lambda request: ((0.5, 2.0, -1.0),)
    submitted: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    resident: dict[Digest, tuple[str, str | None]] = field(default_factory=dict)
    unloads: list[tuple[Digest, bool]] = field(default_factory=list)  # and whether it was deleted

    def __post_init__(self) -> None:
        self._change = threading.Condition()
        self._running: dict[str, _Running] = {}
        self.held = self._stopping = False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    # -- the protocol

    def submit(self, request: Request) -> None:
        if self.refusal is not None:
            raise self.refusal
        with self._change:
            self.submitted.append(request)
            self._running[request.id] = _Running(request, [*self.script(request), self.eos])
            self._change.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._change:
            self.cancelled.append(request_id)
            known = self._running.pop(request_id, None)
            self._change.notify_all()
        if known is not None:
            self.publish([Event(request_id, finish=FinishReason.CANCELLED)])

    def warm(self, digests: tuple[Digest, ...], tenant: str = "default") -> Future[None]:
        future: Future[None] = Future()
        if self.failure is not None:
            self.resident |= dict.fromkeys(digests, ("failed", str(self.failure)))
            future.set_exception(self.failure)
        else:
            self.resident |= dict.fromkeys(digests, ("resident", None))
            future.set_result(None)
        return future

    def unload(self, digest: Digest, *, deleted: bool = False) -> bool:
        self.unloads.append((digest, deleted))
        return self.resident.pop(digest, None) is not None

    def residency(self, digest: Digest) -> tuple[str, str | None]:
        if self.crash is not None:
            raise self.crash
        return self.resident.get(digest, ("stored", None))

    def step_times(self) -> StepTimes:
        times = StepTimes()
        times.begin()
        times.mark("plan")
        times.end(rows=2, tokens=2)
        return times

    def stats(self) -> EngineStats:
        with self._change:
            resident = tuple(digest for digest, state in self.resident.items() if state[0] == "resident")
            return EngineStats(len(self._running), 0, 3, 12, len(resident), 4, resident)

    # -- what tests do with it

    def hold(self) -> None:
        with self._change:
            self.held = True

    def go(self) -> None:
        with self._change:
            self.held = False
            self._change.notify_all()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Block until something the engine was told makes `condition` true."""
        with self._change:
            assert self._change.wait_for(condition, timeout=10)

    def stop(self) -> None:
        with self._change:
            self._stopping = True
            self._change.notify_all()
        self._thread.join(10)

    # -- its thread

    def _loop(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._stopping or (self._running and not self.held and not self.silent))
                if self._stopping:
                    return
                events = [self._advance(item) for item in list(self._running.values())]
                self._change.notify_all()
            self.publish(events)

    def _advance(self, item: _Running) -> Event:
        request, index = item.request, item.made
        if self.failure is not None and index >= self.failure_after:
            del self._running[request.id]
            return Event(request.id, finish=FinishReason.ERROR, error=self.failure)
        if request.task != "generate":
            del self._running[request.id]
            return Event(request.id, finish=FinishReason.SCORED, scores=self.scorer(request), queue_seconds=0.25)
        item.made += 1
        self.held = self.held or item.made == self.pause_after
        id = item.script[index]
        finish = self._finish(item, id)
        if finish is not None:
            del self._running[request.id]
        top = tuple((id + n, -0.5 - n) for n in range(request.sampling.top_n))
        return Event(
            request.id,
            tokens=(Token(id, -0.5, top),),
            finish=finish,
            prompt=self._prompt(request) if index == 0 else (),
            queue_seconds=0.25 if index == 0 else None,
        )

    def _finish(self, item: _Running, id: int) -> FinishReason | None:
        if id == self.eos and not item.request.sampling.ignore_eos:
            return FinishReason.EOS
        at_limit = item.made in (item.request.sampling.max_new_tokens, len(item.script))
        return FinishReason.LENGTH if at_limit else None

    @staticmethod
    def _prompt(request: Request) -> tuple[Token, ...]:
        if not request.sampling.prompt_logprobs:
            return ()
        return tuple(Token(id, None if index == 0 else -1.0) for index, id in enumerate(request.prompt))


def validate(paths: Mapping[str, Path], digest: Digest) -> Mapping[str, JSON]:
    """A checkpoint reader that wants a config and believes what it says."""
    if "adapter_config.json" not in paths:
        raise AdapterError("adapter_config.json", "is missing")
    config = paths["adapter_config.json"].read_bytes()
    if config.startswith(b"bad"):
        raise AdapterError("r", "must be between 1 and 256, got 0")
    virtual = int(config.removeprefix(b"virtual ")) if config.startswith(b"virtual ") else 0
    return {"methods": ["lora", "prefix_tuning"] if virtual else ["lora"], "virtual_tokens": virtual, "rank": 8}
