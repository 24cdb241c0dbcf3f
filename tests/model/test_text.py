"""Tokenizer, incremental detokeniser, stop sequences."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from server.errors import ValidationError
from server.model.text import Match, StopMatcher, Stream, Text, Transcript
from tests.api.fakes import tiny_tokenizer

TEXT = Text(tiny_tokenizer())
EMOJI = "\N{GRINNING FACE}"


def byte_fallback() -> Text:
    """A Llama-like tokenizer: leading spaces are a mark, unknown characters become byte tokens."""
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    vocab |= {word: 258 + index for index, word in enumerate(("▁", "▁a", "b", "▁b"))}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Text(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


def pieces(text: Text, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = Stream(text, prompt or [])
    return [stream.push(id) for id in ids]


# -- Text ------------------------------------------------------------------------------------------------------------


def test_pieces_of_a_prompt_get_what_opens_a_text_once_and_what_closes_one_never() -> None:
    tokenizer = tiny_tokenizer()
    marks = [("<s>", 0), ("<|start|>", 2), ("</s>", 1)]
    single = "<s> <|start|> $A </s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    closing = Text(tokenizer)
    cat, sat = (TEXT.encode(piece) for piece in ("the cat", " sat"))
    assert closing.encode("the cat") == [0, 2, *cat, 1]
    assert [*closing.encode_piece("the cat", first=True), *closing.encode_piece(" sat", first=False)] == [0, 2, *cat, *sat]
    assert TEXT.encode_piece("the cat", first=True) == TEXT.encode_piece("the cat", first=False) == cat
    assert (closing.encode_piece("", first=True), closing.encode_piece("", first=False)) == ([0, 2], [])


@given(st.text(max_size=40))
def test_every_text_comes_back(content: str) -> None:
    assert TEXT.decode(TEXT.encode(content)) == content


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("a\x00b", "a\x00b"), ("a\ud83d", "a\N{REPLACEMENT CHARACTER}"), ("\ud83d\ude00", EMOJI), ("", "")],
)
def test_odd_characters(sent: str, kept: str) -> None:
    assert TEXT.decode(TEXT.encode(sent)) == kept


def test_truncate_keeps_the_last_tokens() -> None:
    assert TEXT.encode("hello world", truncate=1) == TEXT.encode("hello world")[-1:]
    assert TEXT.encode("hello", truncate=99) == TEXT.encode("hello")


def test_leading_special_token() -> None:
    text = Text(tiny_tokenizer(bos=True))
    assert text.encode("hello")[0] == 0
    assert text.encode("hello", special=False) == text.encode("hello")[1:]
    assert text.offsets("hello")[0].text == "<s>"


def test_special_and_eos_ids() -> None:
    assert TEXT.eos_ids == {1}
    assert TEXT.special_ids == {0, 1, 2, 3}
    assert Text(tiny_tokenizer(), eos_ids=(3, 1)).eos_ids == {1, 3}


def test_a_shared_tokenizers_truncation_is_switched_off() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert len(Text(tokenizer).encode("z" * 50)) == 50


def test_threads_share_one_tokenizer() -> None:
    texts = [f"hello {n} {EMOJI}" * (n + 1) for n in range(50)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(TEXT.encode, texts)) == [TEXT.encode(text) for text in texts]


def test_chat() -> None:
    rendered = TEXT.chat([{"role": "user", "content": "hi"}])
    assert rendered == "<|start|>user\nhi<|end|>\n<|start|>assistant"
    with pytest.raises(ValidationError, match="no such role"):
        TEXT.chat([{"role": "robot", "content": "hi"}])
    with pytest.raises(ValidationError, match="no chat template"):
        Text(tiny_tokenizer(chat=False)).chat([{"role": "user", "content": "hi"}])


# -- Stream ----------------------------------------------------------------------------------------------------------


@given(st.text(max_size=30))
def test_pieces_are_whole_characters_and_add_up(content: str) -> None:
    shown = pieces(TEXT, TEXT.encode(content))
    if "\N{REPLACEMENT CHARACTER}" not in content:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
        assert "".join(shown) == content


def test_a_character_appears_with_its_last_byte() -> None:
    assert pieces(TEXT, TEXT.encode(f"a{EMOJI}b")) == ["a", "", "", "", EMOJI, "b"]


def test_flush_drops_half_a_character() -> None:
    stream = Stream(TEXT)
    shown = [stream.push(id) for id in TEXT.encode(f"a{EMOJI}")[:-1]]
    assert ("".join(shown), stream.flush()) == ("a", "")


@given(st.lists(st.integers(128, 255), max_size=60))
def test_bytes_that_are_no_text_are_let_go(broken: list[int]) -> None:
    """A broken adapter may generate such bytes for ever: the cost of a token must not grow with their number."""
    stream = Stream(TEXT)
    for byte in broken:
        stream.push(token_of_byte(byte))
        assert len(stream._ids) <= 20


def test_text_after_garbage_is_whole_again() -> None:
    garbage = [token_of_byte(0x80)] * 30
    shown = "".join(pieces(TEXT, garbage + TEXT.encode(f"{EMOJI} hello")))
    assert shown.endswith(f"{EMOJI} hello")


def token_of_byte(byte: int) -> int:
    """The token of a single byte that is no ASCII, through byte-level BPE's printable stand-ins."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = byte if byte in printable else 256 + [b for b in range(256) if b not in printable].index(byte)
    id = TEXT._backend.token_to_id(chr(stand_in))
    assert id is not None
    return int(id)


def test_leading_space_is_kept_after_a_prompt() -> None:
    text = byte_fallback()
    a, b = 259, 261
    assert text.decode([a, b]) == "a b"
    assert pieces(text, [a, b], prompt=[260]) == [" a", " b"]


def test_byte_fallback_characters() -> None:
    text = byte_fallback()
    ids = [259, *(byte + 2 for byte in f"{EMOJI}é".encode()), 260]
    assert pieces(text, ids, prompt=[260]) == [" a", "", "", "", EMOJI, "", "é", "b"]


# -- StopMatcher -----------------------------------------------------------------------------------------------------


def first_end(text: str, stops: list[str]) -> tuple[int, int] | None:
    """The oracle: the earliest end of any stop sequence, the longest if several end there."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if lengths:
            return end, max(lengths)
    return None


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_first_stop_sequence_however_the_text_is_cut(parts: list[str], stops: list[str]) -> None:
    matcher, before = StopMatcher(stops), 0
    expected = first_end("".join(parts), stops)
    for part in parts:
        match = matcher.push(part)
        if match is not None:
            assert expected == (before + match.end, match.length)
            return
        before += len(part)
        whole = "".join(parts)[:before]
        assert matcher.held == max((n for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n])), default=0)
    assert expected is None


def test_stop_sequence_within_one_piece() -> None:
    assert StopMatcher(["b"]).push("abc") == Match(end=2, length=1)


# -- Transcript ------------------------------------------------------------------------------------------------------


def run(ids: list[int], stops: Sequence[str] = ()) -> tuple[str, str, str, bool]:
    """(tokens' texts, answer, what OpenAI would stream, stopped)."""
    transcript = Transcript(TEXT, (), stops)
    tokens, taken = "", ""
    for index, id in enumerate(ids):
        last = index == len(ids) - 1
        tokens += transcript.push(id, last=last)
        taken += transcript.take(last=last)
        if transcript.stopped:
            break
    return tokens, transcript.answer, taken, transcript.stopped


def test_special_tokens_are_spelled_out_but_not_part_of_the_answer() -> None:
    assert run([*TEXT.encode("hi"), 3, *TEXT.encode("yo"), 1]) == ("hi<|end|>yo</s>", "hiyo", "hiyo", False)


def test_stop_sequence_is_in_the_answer_but_not_in_the_chunks() -> None:
    assert run(TEXT.encode("hello world, how"), ["wor"]) == ("hello wor", "hello wor", "hello ", True)


def test_special_token_as_stop_sequence() -> None:
    assert run([*TEXT.encode("hi"), 3, *TEXT.encode("yo")], ["<|end|>"]) == ("hi<|end|>", "hi", "hi", True)


def test_stop_sequence_across_a_special_token() -> None:
    assert run([*TEXT.encode("hi"), 3, *TEXT.encode("yo")], ["i<|end|>y"]) == ("hi<|end|>y", "hiy", "h", True)


def test_what_was_held_back_is_given_at_the_end() -> None:
    assert run(TEXT.encode("hello wor"), ["world"]) == ("hello wor", "hello wor", "hello wor", False)


def test_pending_bytes_before_a_special_token_are_dropped() -> None:
    half = TEXT.encode(EMOJI)[:2]
    assert run([*TEXT.encode("a"), *half, 1]) == ("a</s>", "a", "a", False)


@given(st.text(f"ab {EMOJI}", max_size=20), st.lists(st.text(f"ab {EMOJI}", min_size=1, max_size=3), max_size=2))
def test_chunks_are_the_answer_up_to_the_stop_sequence(content: str, stops: list[str]) -> None:
    tokens, answer, taken, stopped = run(TEXT.encode(content), stops)
    expected = first_end(content, stops)
    assert stopped == (expected is not None)
    end, length = expected or (len(content), 0)
    assert tokens == answer == content[:end]
    assert taken == content[: end - length]
