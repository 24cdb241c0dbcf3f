"""Settings in, a server's parts out: sizes, refusals of what cannot be served, and the demo's seeding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server import assembly
from server.assembly import (
    CacheSizeError,
    Server,
    adapter_budget,
    admission_limits,
    assemble,
    cache_shape,
    check_files,
    choose_device,
    scheduler_limits,
    seed_demo,
)
from server.demo import DemoAdapter
from server.errors import AdapterError, UnavailableError
from server.methods import METHODS
from server.model.attention import UnsupportedModelError
from server.model.kernels import Kernels
from server.model.loader import Base, load_base, rounded
from server.model.runner import CacheShape, block_nbytes
from server.settings import Settings
from tests.e2e.uploads import HIDDEN, lora

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(tiny_base, torch.device("cpu"), torch.float32)


@pytest.fixture
def server(tiny_base: Path, tmp_path: Path) -> Iterator[Server]:
    """Assembled, not started; without native kernels, which need a compiler."""
    settings = Settings(model=str(tiny_base), store=tmp_path / "store", native=False, threads=1, kv_cache_gb=0.001)
    server = assemble(settings)
    yield server
    server.engine.stop()
    server.store.close()


# -- sizes


def test_the_cache_takes_what_it_is_given(base: Base) -> None:
    settings = Settings(kv_cache_gb=0.001, block_size=8)
    assert cache_shape(settings, base) == CacheShape(int(0.001 * 1e9) // block_nbytes(base, 8), 8)


def test_a_cache_too_small_for_anything_names_the_least_that_will_do(base: Base) -> None:
    least = assembly.MIN_BLOCKS * block_nbytes(base, 16)
    with pytest.raises(CacheSizeError, match=r"^--kv-cache-gb 1e-06 holds 0 blocks of --block-size 16") as refused:
        cache_shape(Settings(kv_cache_gb=1e-6), base)
    named = float(str(refused.value).rpartition("--kv-cache-gb ")[2])
    assert least <= named * 1e9 < least * 1.1
    assert cache_shape(Settings(kv_cache_gb=named), base).blocks >= assembly.MIN_BLOCKS


def test_the_cache_takes_no_more_than_the_requests_could_use(base: Base) -> None:
    """Two requests of 64 positions in blocks of 16, one more block each for the tail of a prefix, and the null block."""
    settings = Settings(kv_cache_gb=100, max_running=2, max_total_tokens=64)
    assert cache_shape(settings, base) == CacheShape(2 * (4 + 1) + 1, 16)


def test_without_a_size_the_cache_takes_a_share_of_free_memory(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = 40
    monkeypatch.setattr(assembly, "_free_memory", lambda device: blocks * block_nbytes(base, 16) / assembly.FREE_MEMORY_SHARE)
    assert cache_shape(Settings(), base) == CacheShape(blocks, 16)


def test_adapters_get_what_they_are_given_or_a_share_of_free_memory(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "_free_memory", lambda device: 4000)
    assert adapter_budget(Settings(), base) == 1000
    assert adapter_budget(Settings(adapter_memory_mb=1.5), base) == 3 << 19


@pytest.mark.parametrize(
    ("wanted", "blocks", "got"),
    [(0, 10_000, 4096), (100, 10_000, 100), (9999, 10_000, 4096), (0, 12, 160), (200, 12, 160)],
    ids=["the model's", "the setting", "never more than the model's", "what the cache holds", "even if more is wanted"],
)
def test_the_context_of_a_request(base: Base, wanted: int, blocks: int, got: int) -> None:
    limits = scheduler_limits(Settings(max_total_tokens=wanted), base, CacheShape(blocks, 16), Kernels("torch"))
    assert limits.max_total_tokens == got


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, None),
        ({"require_keys": True}, 3),
        ({"require_keys": True, "max_waiting_per_tenant": 9}, 9),
        ({"max_waiting_per_tenant": 2}, 2),
    ],
)
def test_with_keys_no_tenant_has_the_whole_queue(settings: dict[str, Any], share: int | None) -> None:
    limits = admission_limits(Settings(max_running=4, max_waiting=10, **settings))
    assert (limits.max_running, limits.max_waiting, limits.max_waiting_per_tenant, limits.queue_timeout) == (4, 10, share, None)


def test_a_queue_timeout_is_given_to_the_engine() -> None:
    assert admission_limits(Settings(queue_timeout=2.5)).queue_timeout == 2.5


def test_the_device_and_dtype_that_auto_stands_for() -> None:
    auto = (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)
    assert choose_device(Settings()) == auto
    assert choose_device(Settings(device="cpu", dtype="bfloat16")) == (torch.device("cpu"), torch.bfloat16)


# -- what cannot be served


def without_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def with_a_torn_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def with_torn_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def without_a_tensor(directory: Path) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def with_a_tensor_of_another_shape(directory: Path) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.zeros(7)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_tokenizer, "has no fast tokenizer"),
        (with_a_torn_config, "is not a decoder that can be served: .*config.json"),
        (with_torn_weights, "is not a decoder that can be served: "),
        (without_a_tensor, "lacks 1 of the model's tensors, model.layers.1.mlp.up_proj.weight for one"),
        (with_a_tensor_of_another_shape, r"holds model.norm.weight in shape \[7\], the model needs \[32\]"),
    ],
)
def test_a_broken_model_directory_is_refused_by_name(tiny_base: Path, tmp_path: Path, change: Change, words: str) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(tiny_base, directory)
    change(directory)
    with pytest.raises(UnsupportedModelError, match=f"{directory} {words}"):
        assemble(Settings(model=str(directory), store=tmp_path / "store", native=False, threads=1, kv_cache_gb=0.001))


def test_a_store_that_cannot_be_opened_is_named(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UnavailableError, match=f"^--store {path}: "):
        assemble(Settings(model=str(tiny_base), store=path, native=False, threads=1, kv_cache_gb=0.001))


# -- adapters


def saved(files: dict[str, bytes], directory: Path) -> Path:
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def test_an_upload_that_the_device_could_never_hold_is_refused_by_name(base: Base, tmp_path: Path) -> None:
    directory = saved(lora(1), tmp_path / "lora")
    files = {path.name: path for path in directory.iterdir()}
    needed = 2 * 2 * 8 * (HIDDEN + HIDDEN) * 4  # two layers, slots 0 and 1, rank bucket 8, fp32
    assert [part.method for part in check_files(files, base, Settings(), needed)] == ["lora"]
    message = (
        rf"^lora: the adapter needs {needed} bytes of device memory, over this server's {needed - 1} \(--adapter-memory-mb\)"
    )
    with pytest.raises(AdapterError, match=message):
        check_files(files, base, Settings(), needed - 1)


# -- the demo


class Local(DemoAdapter):
    """A demo adapter in a directory of the test's."""

    root: Path

    @property
    def directory(self) -> Path:
        return self.root / self.name


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Local, "root", tmp_path, raising=False)
    names = {"one": "ann", "two": None}
    for seed, name in enumerate(names):
        saved(lora(seed), tmp_path / name)
    monkeypatch.setattr(assembly, "DEMO", tuple(Local(name, user, "lora", "") for name, user in names.items()))


@pytest.mark.usefixtures("demo")
def test_seeding_the_demo_twice_changes_nothing(server: Server) -> None:
    seed_demo(server)
    seed_demo(server)
    records, _ = server.store.list("default")
    assert {(record.name, record.version, record.method) for record in records} == {("one", 1, "lora"), ("two", 1, "lora")}
    users, _ = server.store.list_users("default")
    assert {(user.user_id, user.adapter_id) for user in users} == {("ann", "one")}


def test_the_demo_on_another_base_says_which_it_needs(server: Server) -> None:
    with pytest.raises(AdapterError, match=r"^--demo: its adapters were trained on smollm2-135m-instruct; pirate-lora: "):
        seed_demo(server)
    assert server.store.count() == 0


def test_a_quantized_base_says_so_and_is_another_base(tiny_base: Path, tmp_path: Path, base: Base) -> None:
    settings = Settings(model=str(tiny_base), store=tmp_path / "store", quantize="int8", kv_cache_gb=0.01, threads=1)
    server = assemble(settings)
    try:
        info = server.app.state.services.info
        assert info["quantize"] == "int8"
        assert info["base_bytes"] == server.base.nbytes < base.nbytes
        assert server.base.shape.digest == rounded(base.shape.digest)
    finally:
        server.engine.stop()
        server.store.close()


def test_what_info_says_is_json_and_names_every_family(server: Server) -> None:
    info = server.app.state.services.info
    assert json.loads(json.dumps(info)) == dict(info)
    assert info["methods"] == sorted(METHODS)
    assert info["kv_blocks_total"] == server.engine.stats().kv_blocks_total > 0
    assert server.engine.stats().slots_total == server.settings.adapter_slots
    assert server.readiness.phase == "loading"
