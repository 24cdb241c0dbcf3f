"""Kernels: native where it can be, pure torch with the reason in its name where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.methods.grouped import lora_loop, rows_of
from server.model import cuda
from server.model import kernels as module
from server.model.attention import torch_attention, torch_write
from server.model.cuda import CudaKernels
from server.model.kernels import Kernels, choose_kernels
from server.model.native import NativeKernels, NativeUnavailable
from server.settings import default_home
from tests.lab import Lab
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def choose(device: str = "cpu", dtype: torch.dtype = torch.float32, wanted: bool = True) -> Kernels:
    return choose_kernels(torch.device(device), dtype, wanted, Path("/nowhere"), lambda line: None)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No native library may even be looked for."""

    def refuse(home: Path, say: Callable[[str], None]) -> NativeKernels:
        raise AssertionError("the native library was opened")

    monkeypatch.setattr(module, "open_library", refuse)


def is_pure_torch(kernels: Kernels) -> bool:
    return (kernels.attention, kernels.write, kernels.lora, kernels.prepare) == (torch_attention, torch_write, None, None)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"wanted": False}, "torch (--no-native)"),
        ({"dtype": torch.bfloat16}, "torch (cpu, torch.bfloat16)"),
        ({"device": "cuda", "wanted": False}, "torch (--no-native)"),
        ({"device": "meta"}, "torch (meta, torch.float32)"),
    ],
)
def test_torch_and_why(arguments: dict[str, object], name: str) -> None:
    kernels = choose(**arguments)  # type: ignore[arg-type]
    assert kernels.name == name
    assert is_pure_torch(kernels)


@pytest.mark.usefixtures("untouched")
def test_a_gpus_own_kernels_are_asked_for_by_dtype_and_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def chosen(*given: object) -> CudaKernels:
        asked.extend(given)
        return CudaKernels("cuda (all)", torch_attention, None, graphable=True)

    monkeypatch.setattr(cuda, "choose", chosen)
    kernels = choose_kernels(torch.device("cuda"), torch.bfloat16, True, Path("/nowhere"), lambda line: None, 256)
    assert (kernels.name, kernels.graphable) == ("cuda (all)", True)
    assert asked == [torch.device("cuda"), torch.bfloat16, 256]


def test_a_machine_without_a_compiler_gets_torch_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(home: Path, say: Callable[[str], None]) -> NativeKernels:
        raise NativeUnavailable("no C++ compiler found")

    monkeypatch.setattr(module, "open_library", missing)
    kernels = choose()
    assert kernels.name == "torch (no C++ compiler found)"
    assert is_pure_torch(kernels)


def test_the_library_is_sought_in_the_given_home_and_its_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def missing(home: Path, say: Callable[[str], None]) -> NativeKernels:
        say(f"compiling into {home}")
        raise NativeUnavailable("gone")

    monkeypatch.setattr(module, "open_library", missing)
    choose_kernels(CPU, torch.float32, True, Path("/some/home"), told.append)
    assert told == ["compiling into /some/home"]


@pytest.fixture(scope="module")
def native() -> Kernels:
    torch.set_num_threads(1)
    chosen = choose_kernels(CPU, torch.float32, True, default_home(), lambda line: None)
    if chosen.name != "native":
        pytest.skip(chosen.name)
    return chosen


def test_native_kernels_replace_everything(native: Kernels) -> None:
    assert native.lora is not None
    assert native.prepare is not None
    assert native.attention is not torch_attention
    assert native.write is not torch_write


@pytest.mark.parametrize("slots", [[0, 0, 4, 4, 4, 0, 7], [1, 1, 1], [2, 1, 2, 1], [0, 3]])
def test_the_native_lora_is_the_plain_loop(slots: list[int], native: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, a, b = (
        torch.randn(*size, generator=generator) for size in ((len(slots), 24), (len(slots), 40), (8, 8, 24), (8, 8, 40))
    )
    expected = y.clone()
    lora_loop(x, expected, a, b, rows_of(slots))
    strided = torch.stack([x, x], dim=2)[..., 0]
    assert native.lora is not None
    native.lora(a, b, rows_of(slots))(strided, y)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_server_without_a_compiler_gives_the_same_tokens(native: Kernels) -> None:
    def tokens(kernels: Kernels) -> tuple[list[int], Tensor]:
        lab = Lab(tiny_model("qwen2"), {}, kernels=kernels)
        lab.submit("a", [5, 6, 7, 8, 9], max_new_tokens=12)
        lab.run()
        return lab.tokens("a"), lab.logits("a")

    (fast, fast_logits), (plain, plain_logits) = tokens(native), tokens(Kernels("torch"))
    assert fast == plain
    assert (fast_logits - plain_logits).abs().max() < 1e-3
