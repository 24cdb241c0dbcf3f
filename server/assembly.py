"""Assembly: settings in, a running server's parts out. The only place that knows how everything fits together.

settings -> base -> runner + scheduler -> engine -> client -> app          store, tokenizer and metrics beside it
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_UP, Decimal
from pathlib import Path

import psutil
import structlog
import torch
from fastapi import FastAPI
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adapters_store.digest import Digest
from adapters_store.errors import StoreError
from adapters_store.records import JSON
from adapters_store.store import Store, open_store

from . import __version__, host_memory
from .api.app import create_app
from .api.readiness import Readiness
from .checkpoints.folder import Folder
from .checkpoints.incoming import inspector
from .demo import BASE as DEMO_BASE
from .demo import DEMO, DemoAdapter
from .engine.engine import Engine
from .engine.footprint import Footprint
from .engine.mailbox import Mailbox
from .engine.pages import Pages
from .engine.residency import Residency
from .engine.scheduler import Scheduler, SchedulerLimits
from .errors import AdapterdError, AdapterError, UnavailableError
from .memory import Reclaimer
from .methods import build_methods
from .methods.base import Adapter, Limits, Part
from .methods.read import describe, read_adapter, read_parts
from .methods.weigh import check_fits, footprint_of
from .metrics import Metrics
from .model.attention import UnsupportedModelError
from .model.graphs import CudaRecord, GraphLimits
from .model.kernels import Kernels, choose_kernels
from .model.loader import Base, load_base
from .model.pace import tokens_beside_streams
from .model.pull import Report, quiet, resolve
from .model.runner import CacheShape, Runner, block_nbytes
from .model.text import Text
from .serving import lifespan
from .settings import Settings, default_home, default_store
from .tenancy.quotas import Admission, AdmissionLimits

log = structlog.get_logger(__name__)

FREE_MEMORY_SHARE = 0.25  # of what is free after the base is loaded, for the KV cache; and as much for adapters
MAX_CONTEXT = 8192
MIN_BLOCKS = 4  # the null block, one for the copy of a prefix's last block, and two of text
FETCHED, LOADED = 50.0, 90.0  # percent of a start, by and large


class CacheSizeError(AdapterdError):
    """`--kv-cache-gb` is too small to serve anything."""


@dataclass(frozen=True)
class Server:
    """The parts of one server. `engine` is not started yet: the app's lifespan does that."""

    settings: Settings
    base: Base
    adapter_budget: int  # bytes
    engine: Engine
    store: Store
    metrics: Metrics
    app: FastAPI
    readiness: Readiness


def assemble(settings: Settings, report: Report = quiet, readiness: Readiness | None = None) -> Server:
    """Load the base and put everything together; `readiness` is told how far it is.

    Raises: AdapterdError naming what is wrong.
    """
    readiness = readiness or Readiness("loading")
    device, dtype = choose_device(settings)
    threads = settings.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    directory = resolve(settings.model, default_home(), _counted(report, readiness))
    readiness.loading(FETCHED)
    kernels = choose_kernels(
        device,
        dtype,
        settings.native,
        default_home(),
        lambda line: report(line, 0, 0),
        settings.block_size,
        int8=settings.quantize == "int8",
    )
    base = load_base(directory, device, dtype, kernels.prepare, kernels.int8)
    readiness.loading(LOADED)
    reclaimer = Reclaimer()
    reclaimer.trim()  # the weights as they were before they were packed
    cache = cache_shape(settings, base)
    limits = scheduler_limits(settings, base, cache, kernels)
    budget = adapter_budget(settings, base)
    store = _open_store(settings)
    text = Text(tokenizer_of(directory), base.eos)
    base = replace(base, shape=replace(base.shape, tokens=text.encode_piece))
    metrics = Metrics(settings.model, settings.metrics_top_k)
    mailbox = Mailbox()
    runner = _runner(settings, base, cache, limits, kernels)
    full = min(limits.max_batch_tokens, limits.max_total_tokens)
    written = runner.warm_up(full)
    limits = replace(limits, max_prefill_tokens=settings.max_prefill_tokens or tokens_beside_streams(runner, full))
    # Interpreter, libraries, tokenizer, and the buffers of a full step.
    runtime_bytes = max(0, psutil.Process().memory_info().rss - base.nbytes - written)
    engine = Engine(
        runner,
        Scheduler(
            Pages(cache.blocks, cache.block_size),
            Residency(settings.adapter_slots, budget),
            limits,
            base.shape.digest,
            base.eos,
        ),
        _loader(store, base, settings, reclaimer),
        metrics,
        mailbox.publish,
        settings.host_cache_mb << 20,
        lambda adapter: weighed(adapter.parts, base, budget),
        Admission(admission_limits(settings)),
    )
    readiness.watch(lambda: engine.stalled(settings.watchdog_seconds))
    app = create_app(
        engine=engine,
        text=text,
        store=store,
        metrics=metrics,
        settings=settings,
        inspect=inspector,
        validate=_validator(base, settings, budget, reclaimer, engine.keep),
        model_name=settings.model,
        mailbox=mailbox,
        max_total_tokens=limits.max_total_tokens,
        info={
            **_info(settings, base, cache, limits, kernels, threads),
            "adapter_memory_bytes": budget,
            "runtime_bytes": runtime_bytes,
        },
        readiness=readiness,
        lifespan=lifespan(engine, readiness, store),
    )
    known = {"digest": base.shape.digest.short, "kernels": kernels.name, "quantize": settings.quantize}
    log.info("base model ready", model=settings.model, **known)
    return Server(settings, base, budget, engine, store, metrics, app, readiness)


def _runner(settings: Settings, base: Base, cache: CacheShape, limits: SchedulerLimits, kernels: Kernels) -> Runner:
    """With CUDA graphs where they are asked for and possible: their spare rows write to a block that nobody is given."""
    methods = build_methods(kernels.lora, kernels.linear, kernels.bottleneck)
    if not _graphs(settings, kernels):
        return Runner(base, cache, methods, kernels)
    runner = Runner(base, replace(cache, blocks=cache.blocks + 1), methods, kernels)
    width = -(-limits.max_total_tokens // cache.block_size) + 1
    runner.use_graphs(CudaRecord(), GraphLimits(limits.max_running, width, cache.block_size, spare_block=cache.blocks))
    return runner


def _graphs(settings: Settings, kernels: Kernels) -> bool:
    return settings.cuda_graphs and kernels.graphable


def _counted(report: Report, readiness: Readiness) -> Report:
    """`report`, which also moves the percentage while the base is fetched and converted, each from 0 to its total."""

    def counted(what: str, done: int, total: int) -> None:
        if total:
            readiness.loading(max(readiness.percent, FETCHED * min(1.0, done / total) / 2))
        report(what, done, total)

    return counted


def seed_demo(server: Server) -> None:
    """Upload the bundled adapters and bind their users; what is there already is left as it is.

    Raises: AdapterError when the base is another one than they were trained on.
    """
    for demo in DEMO:
        try:
            _seed(server, demo, tenant="default")
        except AdapterError as error:
            raise AdapterError("--demo", f"its adapters were trained on {DEMO_BASE}; {demo.name}: {error}") from error


def _seed(server: Server, demo: DemoAdapter, tenant: str) -> None:
    store = server.store
    with store.stage() as staged:
        for name, path in Folder.of(demo.directory).files.items():
            with staged.file(name) as file:
                file.write(path.read_bytes())
        details = describe(check_files(staged.paths, server.base, server.settings, server.adapter_budget))
        store.publish(staged, tenant=tenant, name=demo.name, method=demo.method, parts=demo.parts, details=details)
    if demo.user_id:
        store.bind_user(tenant, demo.user_id, demo.name)


def check_files(paths: Mapping[str, Path], base: Base, settings: Settings, budget: int) -> tuple[Part, ...]:
    """Validation as `POST /adapters` does it: with the very reader that later loads the adapter. Raises: AdapterError."""
    parts = read_parts(paths, base.shape, upload_limits(settings))
    weighed(parts, base, budget)
    return parts


def weighed(parts: Sequence[Part], base: Base, budget: int) -> Footprint:
    """Raises: AdapterError for an adapter that `budget` bytes of device memory cannot hold."""
    footprint = footprint_of(parts, base.shape, base.dtype)
    check_fits(parts, footprint, budget)
    return footprint


def choose_device(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """`auto` is CUDA with bf16 where there is one, else the CPU with fp32."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if settings.device == "auto" else settings.device)
    if settings.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, settings.dtype)


def cache_shape(settings: Settings, base: Base) -> CacheShape:
    """Blocks that fit the memory given, but no more than `max_running` requests of full length could use.

    Raises: CacheSizeError when the memory that was asked for holds next to nothing.
    """
    per_block = block_nbytes(base, settings.block_size)
    budget = int(settings.kv_cache_gb * 1e9) if settings.kv_cache_gb else int(_free_memory(base.device) * FREE_MEMORY_SHARE)
    useful = settings.max_running * (-(-_context(settings, base) // settings.block_size) + 1) + 1
    blocks = min(budget // per_block, useful)
    if settings.kv_cache_gb and budget // per_block < MIN_BLOCKS:
        raise CacheSizeError(
            f"--kv-cache-gb {settings.kv_cache_gb:g} holds {budget // per_block} blocks of --block-size {settings.block_size}; "
            f"at least {MIN_BLOCKS} are needed, which is --kv-cache-gb {_rounded_up(MIN_BLOCKS * per_block / 1e9)}"
        )
    return CacheShape(max(MIN_BLOCKS, blocks), settings.block_size)


def adapter_budget(settings: Settings, base: Base) -> int:
    """Bytes of device memory for resident adapters."""
    if settings.adapter_memory_mb:
        return int(settings.adapter_memory_mb * (1 << 20))
    return int(_free_memory(base.device) * FREE_MEMORY_SHARE)


def _rounded_up(size: float) -> str:
    """Two digits that are no less than `size`, as a flag takes them."""
    step = Decimal(1).scaleb(Decimal(size).adjusted() - 1)
    return f"{Decimal(size).quantize(step, ROUND_UP).normalize():f}"


def scheduler_limits(settings: Settings, base: Base, cache: CacheShape, kernels: Kernels) -> SchedulerLimits:
    # A request alone must always fit: its own blocks, one for the copy of a prefix's last block, and the null block.
    fits = (cache.blocks - 2) * cache.block_size
    return SchedulerLimits(
        max_batch_tokens=settings.max_batch_tokens,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        max_total_tokens=min(_context(settings, base), fits),
        max_prefill_tokens=settings.max_prefill_tokens,
        speculate=settings.speculate,
        splits_prompts=kernels.splits_prompts,
    )


def admission_limits(settings: Settings) -> AdmissionLimits:
    """Tenants with keys may be strangers to each other: none of them gets the whole queue, unless the settings say so."""
    share = -(-settings.max_waiting // 4) if settings.require_keys else None
    return AdmissionLimits(
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        max_waiting_per_tenant=settings.max_waiting_per_tenant or share,
        queue_timeout=settings.queue_timeout or None,
    )


def _context(settings: Settings, base: Base) -> int:
    longest = base.shape.max_positions
    return min(settings.max_total_tokens, longest) if settings.max_total_tokens else min(longest, MAX_CONTEXT)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory.available()


def _open_store(settings: Settings) -> Store:
    """Raises: UnavailableError naming the directory; never a URL, which may hold a password."""
    root = settings.store or default_store()
    try:
        return open_store(root, settings.catalog_url, settings.blobs_url, cache_bytes=settings.blob_cache_mb << 20)
    except StoreError as error:
        raise UnavailableError(f"--store {root}: {error}") from error


def tokenizer_of(directory: Path) -> PreTrainedTokenizerFast:
    """Raises: UnsupportedModelError when there is none that runs without Python code."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (ValueError, OSError) as error:
        raise UnsupportedModelError(f"{directory} has no fast tokenizer (tokenizer.json)") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModelError(f"{directory} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def upload_limits(settings: Settings) -> Limits:
    return Limits(
        max_rank=settings.max_rank,
        max_virtual_tokens=settings.max_virtual_tokens,
        max_full_bytes=int(settings.max_full_mb * (1 << 20)),
    )


def _loader(store: Store, base: Base, settings: Settings, reclaimer: Reclaimer) -> Callable[[Digest], Adapter]:
    def load(digest: Digest) -> Adapter:
        adapter = read_adapter(store.files(digest), base.shape, upload_limits(settings), digest)
        reclaimer.passed(2 * adapter.nbytes)  # the file's tensors, and soon the adapter itself
        return adapter

    return load


def _validator(
    base: Base, settings: Settings, budget: int, reclaimer: Reclaimer, keep: Callable[[Adapter], None]
) -> Callable[[Mapping[str, Path], Digest], Mapping[str, JSON]]:
    """Checks an upload, and has `keep` take what was read: the first request through it need not read it again."""

    def validate(paths: Mapping[str, Path], digest: Digest) -> Mapping[str, JSON]:
        reclaimer.passed(2 * sum(path.stat().st_size for path in paths.values()))
        parts = check_files(paths, base, settings, budget)
        keep(Adapter(digest, parts))
        return describe(parts)

    return validate


def _info(
    settings: Settings, base: Base, cache: CacheShape, limits: SchedulerLimits, kernels: Kernels, threads: int
) -> Mapping[str, JSON]:
    """`GET /info`: TGI's and LoRAX's names where they have one."""
    return {
        "model_id": settings.model,
        "model_sha": base.shape.digest,
        "model_dtype": str(base.dtype),
        "model_device_type": base.device.type,
        "model_type": base.shape.model_type,
        "version": __version__,
        "max_total_tokens": limits.max_total_tokens,
        "max_input_length": limits.max_total_tokens - 1,
        "max_batch_total_tokens": (cache.blocks - 1) * cache.block_size,
        "max_batch_prefill_tokens": limits.max_batch_tokens,
        "max_prefill_tokens": limits.max_prefill_tokens,
        "speculate": limits.speculate,
        "max_concurrent_requests": limits.max_running + limits.max_waiting,
        "max_running": limits.max_running,
        "max_waiting_tokens": 0,
        "max_stop_sequences": settings.max_stop_sequences,
        "kv_block_size": cache.block_size,
        "kv_blocks_total": cache.blocks - 1,
        "kv_cache_bytes": cache.nbytes(base),
        "base_bytes": base.nbytes,
        "host_cache_limit_bytes": settings.host_cache_mb << 20,
        "threads": threads,
        "kernels": kernels.name,
        "quantize": settings.quantize,
        "cuda_graphs": _graphs(settings, kernels),
        "methods": sorted(build_methods()),
        "base": {
            "hidden_size": base.shape.hidden_size,
            "num_layers": base.shape.num_layers,
            "num_attention_heads": base.shape.num_heads,
            "num_key_value_heads": base.shape.num_kv_heads,
            "head_dim": base.shape.head_dim,
            "vocab_size": base.shape.vocab_size,
            "modules": {
                name: [module.kind, module.in_features, module.out_features] for name, module in base.shape.modules.items()
            },
            "sublayers": [[s.layer, s.kind, s.exit] for s in base.shape.sublayers],
        },
    }
