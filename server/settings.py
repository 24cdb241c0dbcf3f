"""Settings: every knob of the server, read once from flags or `ADAPTERD_*` variables, frozen afterwards.

Modules take the values they need, never this object; only `server/cli.py` and `server/api/app.py` hold it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def default_home() -> Path:
    """Where downloads, converted base models and native kernels are cached."""
    return Path.home() / ".cache" / "adapterd"


def default_store() -> Path:
    """Where adapters are kept unless `store` says otherwise."""
    return Path.home() / ".local" / "share" / "adapterd"


class Settings(BaseSettings):
    """Field names are the CLI's flags (`kv_cache_gb` is `--kv-cache-gb`) and, upper-cased, `ADAPTERD_*` variables."""

    model_config = SettingsConfigDict(env_prefix="ADAPTERD_", frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field("smollm2-135m-instruct", description="Base model: a local directory, a Hub id or a short name.")
    host: str = Field("127.0.0.1", description="Address to bind.")
    port: int = Field(8080, ge=0, le=65535, description="Port to bind; 0 takes a free one.")
    store: Path | None = Field(None, description="Directory of the adapter store; unset = ~/.local/share/adapterd.")
    catalog_url: str | None = Field(
        None, repr=False, description="postgresql://USER:PASSWORD@HOST/DATABASE for the catalog; unset = a file in --store."
    )
    blobs_url: str | None = Field(
        None, description="s3://BUCKET/PREFIX for adapters' files, reached by AWS_* variables; unset = in --store."
    )
    blob_cache_mb: int = Field(4096, ge=0, description="Local copies of what --blobs-url holds, in MB; they are in --store.")
    demo: bool = Field(False, description="Upload the bundled demo adapters and bind six users to them.")
    require_keys: bool = Field(False, description="Answer only requests with an API key; adapterd keys create makes one.")
    insecure: bool = Field(False, description="Allow binding a non-loopback address although no keys are required.")

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the base lives; auto = cuda if there.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto = bf16 on CUDA, fp32 on CPU.")
    threads: int = Field(0, ge=0, le=1024, description="Compute threads; 0 = every core this process may use.")
    quantize: Literal["none", "int8"] = Field(
        "none", description="int8: the base's linear layers rounded to eight bits, one scale per output channel."
    )
    native: bool = Field(True, description="Use the native CPU kernels where a compiler (or a cached build) is found.")
    cuda_graphs: bool = Field(False, description="Replay decode steps as CUDA graphs; no GPU has run this yet.")

    kv_cache_gb: float | None = Field(None, gt=0, description="KV cache size in GB; unset = a share of free memory.")
    block_size: int = Field(16, ge=1, le=512, description="Token positions per KV block; multiples of 16 are fastest on a CPU.")
    max_batch_tokens: int = Field(512, ge=1, le=65536, description="Token budget of one step (prefill chunks + decode).")
    max_prefill_tokens: int = Field(
        0,
        ge=0,
        le=65536,
        description="Tokens of each prompt per step in which others stream; 0 = what a start finds to keep steps short.",
    )
    speculate: int = Field(0, ge=0, le=64, description="Tokens guessed ahead per greedy request by prompt lookup; 0 = none.")
    max_running: int = Field(64, ge=1, le=4096, description="Sequences that may be in the batch at once.")
    max_waiting: int = Field(256, ge=0, le=100_000, description="Requests that may queue; the next gets 429.")
    max_waiting_per_tenant: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Of these, one tenant's, where its policy says nothing; 0 = a quarter with --require-keys, else all.",
    )
    queue_timeout: float = Field(
        0, ge=0, description="Seconds a request may wait before it is begun, else it gets 429; 0 = --request-timeout alone."
    )
    adapter_slots: int = Field(32, ge=1, le=4096, description="Adapters resident on the device at once.")
    adapter_memory_mb: float | None = Field(
        None, gt=0, description="Device memory of resident adapters, in MB; unset = a share of free memory."
    )
    host_cache_mb: int = Field(512, ge=0, description="Host memory for parsed adapters that are not resident, in MB.")

    max_total_tokens: int = Field(
        0,
        ge=0,
        description="Prompt + new tokens per request, prefixes included; 0 = the model's context (at most 8192).",
    )
    max_stop_sequences: int = Field(4, ge=0, le=64, description="Stop sequences per request.")
    max_top_n: int = Field(20, ge=0, le=100, description="Alternatives per token a request may ask for.")
    max_request_mb: float = Field(2, gt=0, description="Size of one JSON request body, in MB.")
    max_upload_mb: float = Field(256, gt=0, description="Size of one adapter upload, all files together, in MB.")
    max_rank: int = Field(256, ge=1, le=4096, description="Largest LoRA rank or bottleneck width accepted.")
    max_virtual_tokens: int = Field(512, ge=1, description="Longest prefix or soft prompt accepted, in positions.")
    max_full_mb: float = Field(256, ge=0, description="Whole matrices (modules_to_save) in one upload, in MB; 0 takes none.")
    request_timeout: float = Field(600, gt=0, description="Seconds after which a request is ended with an error.")
    watchdog_seconds: float = Field(
        120, gt=0, description="Seconds a step may take before /livez turns red; ten times that for a start's first step."
    )
    drain_seconds: float = Field(30, ge=0, description="Seconds given to running requests after SIGTERM.")

    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of a listener of its own for /metrics alone, which asks for no key; 0 takes a free one.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address that --metrics-port is bound to.")
    metrics_top_k: int = Field(100, ge=0, description="Adapters (and tenants) that get their own metric label.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto = console on a terminal, else JSON.")
