"""Loader: what a base model is described as, what its digest covers, and how one that cannot be served is refused."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from server.model.attention import UnsupportedModelError
from server.model.kernels import Kernels, choose_kernels
from server.model.loader import Base, digest_of, load_base, make_base
from server.settings import default_home
from tests.lab import BASE
from tests.tiny import POSITIONS, VOCAB, tiny_model

CPU = torch.device("cpu")


def base_of(model: PreTrainedModel) -> Base:
    return make_base(model, BASE, CPU, torch.float32)


def saved(model: PreTrainedModel, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def native() -> Kernels:
    chosen = choose_kernels(CPU, torch.float32, True, default_home(), lambda line: None)
    if chosen.name != "native":
        pytest.skip(chosen.name)
    return chosen


# ---- the digest ----


def test_the_digest_names_files_and_their_contents(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "b.safetensors").write_bytes(b"weights")
    (tmp_path / "a.safetensors").write_bytes(b"more")
    parts = [("config.json", b"{}"), ("a.safetensors", b"more"), ("b.safetensors", b"weights")]
    listing = "".join(f"{name}\0{hashlib.sha256(data).hexdigest()}\n" for name, data in parts)
    assert digest_of(tmp_path) == hashlib.sha256(listing.encode()).hexdigest()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_the_digest_changes_with_one_byte(name: str, tmp_path: Path) -> None:
    for each in ("config.json", "model.safetensors"):
        (tmp_path / each).write_bytes(bytes(range(100)))
    before = digest_of(tmp_path)
    (tmp_path / name).write_bytes(bytes([*range(50), 51, *range(51, 100)]))
    assert digest_of(tmp_path) != before


def test_the_digest_does_not_look_at_other_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    before = digest_of(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert digest_of(tmp_path) == before


def test_the_digest_tells_swapped_and_moved_weights_apart(tmp_path: Path) -> None:
    digests = set()
    for number, contents in enumerate([(b"ab", b"c"), (b"c", b"ab"), (b"a", b"bc")]):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "config.json").write_bytes(b"{}")
        for name, data in zip("xy", contents, strict=True):
            (directory / f"{name}.safetensors").write_bytes(data)
        digests.add(digest_of(directory))
    assert len(digests) == 3


# ---- what a base is described as ----


def test_shape_of_a_llama() -> None:
    shape = base_of(tiny_model("llama")).shape
    assert (shape.digest, shape.model_type, shape.hidden_size, shape.num_layers) == (BASE, "llama", 32, 2)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 8)
    assert (shape.vocab_size, shape.max_positions, shape.tied_embeddings) == (VOCAB, POSITIONS, False)
    described = {n: (m.kind, m.in_features, m.out_features) for n, m in shape.modules.items() if ".1." not in n}
    layer = "model.layers.0"
    assert described == {
        "model.embed_tokens": ("embedding", VOCAB, 32),
        "model.norm": ("norm", 32, 32),
        "lm_head": ("linear", 32, VOCAB),
        f"{layer}.input_layernorm": ("norm", 32, 32),
        f"{layer}.post_attention_layernorm": ("norm", 32, 32),
        f"{layer}.self_attn.q_proj": ("linear", 32, 32),
        f"{layer}.self_attn.k_proj": ("linear", 32, 16),
        f"{layer}.self_attn.v_proj": ("linear", 32, 16),
        f"{layer}.self_attn.o_proj": ("linear", 32, 32),
        f"{layer}.mlp.gate_proj": ("linear", 32, 64),
        f"{layer}.mlp.up_proj": ("linear", 32, 64),
        f"{layer}.mlp.down_proj": ("linear", 64, 32),
    }
    assert all(module.bias is None for module in shape.modules.values())
    assert len(shape.sublayers) == 4


def test_shape_of_a_gpt2_with_its_transposed_weights_and_biases() -> None:
    model = tiny_model("gpt2")
    shape = base_of(model).shape
    attention = shape.modules["transformer.h.0.attn.c_attn"]
    assert (attention.kind, attention.in_features, attention.out_features) == ("conv1d", 32, 96)
    assert attention.bias is not None
    assert torch.equal(attention.bias, model.transformer.h[0].attn.c_attn.bias)
    norm = shape.modules["transformer.h.1.ln_1"]
    assert (norm.kind, norm.out_features, norm.bias is not None) == ("norm", 32, True)
    assert shape.tied_embeddings


def test_norms_of_heads_are_described_by_their_own_width() -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = base_of(Qwen3ForCausalLM(Qwen3Config(**sizes, **counts))).shape
    assert shape.modules["model.layers.0.self_attn.q_norm"].out_features == 8
    assert (shape.head_dim, shape.num_kv_heads) == (8, 2)


def test_the_model_is_frozen_and_in_evaluation_mode() -> None:
    model = base_of(tiny_model("opt").train()).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_a_model_that_names_no_context_gets_a_modest_one() -> None:
    model = tiny_model("llama")
    model.config.max_position_embeddings = 0
    assert base_of(model).shape.max_positions == 2048


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(7, 2, {7}), ([7, 9], 2, {7, 9}), (None, 2, {2}), (None, [2, 5], {2, 5}), (None, None, set()), (0, 2, {0})],
)
def test_eos_ids_come_from_the_generation_config_first(
    generation: int | list[int] | None, config: int | list[int] | None, expected: set[int]
) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = generation
    model.config.eos_token_id = config
    assert base_of(model).eos == expected


# ---- bytes ----


def test_nbytes_counts_every_weight_once() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    base = base_of(model)  # its head is its embedding
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    assert base.nbytes == sum(tensor.nbytes for tensor in held.values())


def test_nbytes_counts_packed_weights_as_they_are_held(native: Kernels) -> None:
    plain = base_of(tiny_model("llama"))
    narrow = tiny_model("llama").bfloat16()
    packed = make_base(narrow, BASE, CPU, torch.float32, native.prepare)
    # bf16 panels are padded to 32 columns: k_proj and v_proj are 16 wide, lm_head 97.
    assert 0.5 * plain.nbytes < packed.nbytes < 0.75 * plain.nbytes


def test_biases_are_read_before_modules_are_packed(native: Kernels) -> None:
    plain = base_of(tiny_model("opt")).shape.modules
    packed = make_base(tiny_model("opt"), BASE, CPU, torch.float32, native.prepare).shape.modules
    assert plain.keys() == packed.keys()
    for name, module in plain.items():
        assert (module.bias is None) == (packed[name].bias is None)
        assert module.bias is None or torch.equal(module.bias, packed[name].bias)  # type: ignore[arg-type]


# ---- from a directory ----


def test_load_base_from_a_directory(llama: Path) -> None:
    base = load_base(llama, CPU, torch.float32)
    assert base.shape.digest == digest_of(llama)
    assert base.eos == {2}
    assert (base.device, base.dtype) == (CPU, torch.float32)
    expected = tiny_model("llama").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base.model.state_dict().items())


def test_load_base_in_another_dtype(llama: Path) -> None:
    base = load_base(llama, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{tmp_path} is not a decoder that can be served: "):
        load_base(tmp_path, CPU, torch.float32)


def test_a_pickled_checkpoint_is_not_read(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    torch.save(tiny_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="is not a decoder that can be served"):
        load_base(tmp_path, CPU, torch.float32)


def test_a_truncated_checkpoint(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UnsupportedModelError, match="is not a decoder that can be served"):
        load_base(tmp_path, CPU, torch.float32)


@pytest.mark.parametrize("name", ["gptj", "falcon"])
def test_an_architecture_that_takes_no_custom_attention(name: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "rotary_dim": 4}
    saved(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)), tmp_path)
    with pytest.raises(UnsupportedModelError, match="its model class does not support a custom attention"):
        load_base(tmp_path, CPU, torch.float32)


def test_tensors_that_are_none_of_the_models_are_one_line_of_the_log(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """transformers' own report of many coloured lines is not printed."""
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    weights = load_file(llama / "model.safetensors") | {"model.extra.weight": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_base(tmp_path, CPU, torch.float32)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith(("server", "transformers"))]
    assert said == f"{tmp_path.name}: 1 tensors are none of the model's, model.extra.weight for one"
    assert "REPORT" not in capfd.readouterr().err


def test_a_model_that_is_no_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    saved(T5ForConditionalGeneration(config), tmp_path)
    with pytest.raises(UnsupportedModelError, match="is not a decoder that can be served"):
        load_base(tmp_path, CPU, torch.float32)


def test_an_encoder_decoder_in_memory() -> None:
    model = tiny_model("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is an encoder-decoder; adapterd serves decoders"):
        base_of(model)


def test_an_unknown_model_type(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "quux", "architectures": ["Quux"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quux"):
        load_base(tmp_path, CPU, torch.float32)


def test_an_architecture_without_a_known_layout_has_no_sublayers() -> None:
    class Other(LlamaForCausalLM):
        pass

    model = Other(tiny_model("llama").config)
    model.config.model_type = "somethingelse"
    assert base_of(model).shape.sublayers == ()


# ---- reading weights back ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("llama", "model.layers.0.mlp.down_proj"),
        ("llama", "lm_head"),
        ("llama", "model.embed_tokens"),
        ("llama", "model.norm"),
        ("gemma", "model.embed_tokens"),
        ("gpt2", "transformer.h.0.attn.c_attn"),
        ("gpt2", "transformer.wte"),
    ],
)
def test_weights_are_read_back_as_copies_whatever_holds_them(name, module, packed, native) -> None:
    model, whole = tiny_model(name), tiny_model(name)
    base = make_base(model, BASE, CPU, torch.float32, native.prepare if packed else None)
    expected = whole.get_submodule(module).weight
    expected = expected.T if base.shape.modules[module].kind == "conv1d" else expected

    weight = base.shape.weight(module)

    assert weight.dtype is torch.float32
    assert torch.equal(weight, expected)
    assert weight.data_ptr() != base.shape.weight(module).data_ptr()
