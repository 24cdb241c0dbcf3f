"""A tenant's policy: its weight and its quotas, as plain data. Kept by the store as JSON, carried by every request."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int | None, Field(default=None, ge=0, le=2**53)]
MAX_WEIGHT = 1000.0

#: Service is counted in these, for fairness and in metrics.
INPUT_PRICE = 1.0  # of one computed prompt token
OUTPUT_PRICE = 2.0  # of one generated token


class TenantPolicy(BaseModel):
    """What one tenant may have. None = only the server's own limits; a count of 0 allows nothing of its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: float = Field(
        1.0, ge=1 / MAX_WEIGHT, le=MAX_WEIGHT, description="Share of the machine, relative to others' weights."
    )
    max_adapters: Count = Field(None, description="Adapter names with a live version.")
    max_adapter_bytes: Count = Field(None, description="Bytes of all live versions together.")
    max_slots: Count = Field(None, description="Adapters resident on the device at once.")
    max_running: Count = Field(None, description="Requests in the batch at once.")
    max_queued: Count = Field(None, description="Requests waiting at once.")
    tokens_per_minute: Count = Field(None, description="Computed prompt tokens + generated tokens per minute.")
    max_new_tokens: Count = Field(None, description="Generated tokens per request.")
    max_n: Count = Field(None, description="Answers (or prompts) one request may ask for.")
    max_stop_sequences: Count = Field(None, description="Stop sequences per request.")


OPEN = TenantPolicy()
