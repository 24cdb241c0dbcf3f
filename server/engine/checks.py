"""Checks: whether a request can be run at all, with its adapters as they turn out to be. Raises what the client is told.

Reads sizes and facts only; owns nothing, changes nothing.
"""

from __future__ import annotations

from typing import Literal

from ..errors import QuotaError, ValidationError
from ..requests import Request
from .plan import Sequence
from .residency import Residency


class Checks:
    """Of one server: its residency and the positions that a request may take."""

    def __init__(self, residency: Residency, max_total_tokens: int) -> None:
        self._residency = residency
        self._max_total_tokens = max_total_tokens

    def request(self, request: Request) -> None:
        """Before it queues. Raises: ValidationError, QuotaError."""
        self._length(request, virtual=0)
        needed, most = len(request.adapters), self._residency.capacity
        if needed > most:
            raise ValidationError(f"`compose` needs {needed} adapter slots at once, this server has {most}")
        allowed = request.policy.max_slots
        if allowed is not None and needed > allowed:
            raise QuotaError(f"the request needs {needed} adapter slots at once, max_slots is {allowed}", "max_slots")

    def together(self, sequence: Sequence) -> None:
        """Its adapters are loaded: whether all fit the device at once. Each alone does. Raises: ValidationError."""
        budget = self._residency.budget
        if budget is None or len(sequence.adapters) < 2:
            return
        needed = self._residency.needed(sequence.adapters)
        if needed > budget:
            what = f"`compose` needs {needed} bytes of device memory for its adapters"
            raise ValidationError(f"{what}, this server has {budget}")

    def virtual(self, sequence: Sequence) -> int:
        """Prefix positions of a sequence whose adapters are resident. Raises: ValidationError if it cannot be run."""
        facts = [self._residency.facts(digest) for digest in sequence.adapters]
        lengths = [each.virtual for each in facts]
        if sum(1 for n in lengths if n) > 1:
            raise ValidationError("`compose` takes at most one adapter with a prefix or soft prompt")
        if any(each.tasks for each in facts):
            raise ValidationError("`task_id` is required: the adapter has a prompt per task")
        pools = [pool for each in facts for pool in each.pools]
        if len(pools) != len(set(pools)):
            raise ValidationError("`compose` cannot apply two adapters of one family and size to one request")
        if sequence.request is not None:
            self._length(sequence.request, sum(lengths))
            if sequence.request.task == "classify" and self._head_reads(sequence) is None:
                raise ValidationError("`adapter_id` must name an adapter with a head to classify with")
        return sum(lengths)

    def may_start_from_cache(self, sequence: Sequence) -> bool:
        """Not where all of the text must be computed: the states behind a mean or a token's label are in no cache."""
        request = sequence.request
        if request is None or request.sampling.prompt_logprobs:
            return False
        if request.task == "embed":
            return request.pooling != "mean"
        return request.task != "classify" or self._head_reads(sequence) != "every"

    def _head_reads(self, sequence: Sequence) -> Literal[None, "last", "every"]:
        """Which positions of the text the head among the sequence's resident adapters reads; None without one."""
        return next((facts.head for d in sequence.adapters if (facts := self._residency.facts(d)).head), None)

    def _length(self, request: Request, virtual: int) -> None:
        given, new = len(request.prompt) + virtual, request.sampling.max_new_tokens
        if given + new > self._max_total_tokens:
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {self._max_total_tokens}. "
                f"Given: {given} `inputs` tokens and {new} `max_new_tokens`"
            )
