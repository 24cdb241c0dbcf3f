"""What is sent: prompts of an exact length that no cache has seen, and which adapter each request goes through.

Owns randomness of the offered load, from one seed. Sends nothing: the server's tokenizer comes in as a function.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from .options import BenchError, Popularity

#: Exponent of the skewed popularity: that of Punica's evaluation (Chen et al., 2023, section 7).
ZIPF: Final = 1.5

_TEXTS = 8  # random texts tried per prompt
_CUTS = 8  # places tried to cut one text

_TEXT: Final = """
able about above across after again air all almost along also always animal another answer around ask away back
base been before began begin being below between book both boy build busy call came can carry change children
city close cold come could country cross day deep does done door down draw drive each earth east eat end enough
even every eye face fact family farm fast father feel few field find fire first fish follow food found four
friend from game gave girl give goes gold good great green ground group grow half hand hard head hear heat help
here high hold home horse hour house idea inch inside island just keep kind king knew land large last later
laugh lead learn leave left less letter life light line list little live long look made make many mark mean
might mile money moon more morning most mother mountain move much music must name near need never next night
north note nothing notice number often old once only open order other over page paper part pass people perhaps
place plain plan plant play point power press problem quick rain reach read ready real rest river road rock room
round rule run same school sea second seem sentence seven ship short should show side simple since sing sit six
sleep slow small snow some song soon sound south space stand star start state stay step still stood stop story
street strong study such sun sure table take talk teach tell ten test than that their then there these they
thing think those thought three through time together told took town travel tree true try turn under until upon
use very voice vowel wait walk want warm watch water week well went west what wheel where which while white
whole wind wood word work world would write year young
"""
_WORDS: Final = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a text and the character at which it stops."""

    id: int
    stop: int


Tokenize = Callable[[str], Awaitable[Sequence[Piece]]]


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    ids: tuple[int, ...]  # as the server reads it


@dataclass(frozen=True, slots=True)
class Order:
    """One request to send; `adapter` None is the base model."""

    prompt: Prompt
    adapter: str | None
    max_new_tokens: int


async def make_prompts(tokenize: Tokenize, count: int, tokens: int, random: Random) -> list[Prompt]:
    """`count` different texts of exactly `tokens` tokens each. Raises: BenchError when the tokenizer allows none."""
    return [await _make_prompt(tokenize, tokens, random) for _ in range(count)]


def rough_prompt(tokens: int, random: Random) -> Prompt:
    """About `tokens` tokens, whose ids only the server knows: for traffic whose requests cannot be prepared one by one."""
    return Prompt(" ".join(random.choices(_WORDS, k=tokens)), ())


async def _make_prompt(tokenize: Tokenize, tokens: int, random: Random) -> Prompt:
    for _ in range(_TEXTS):
        text = " ".join(random.choices(_WORDS, k=tokens))  # a word is one token at least
        found = await _cut(tokenize, text, tokens)
        if found is not None:
            return found
    raise BenchError(f"`prompt_tokens`: the server's tokenizer gives no text of exactly this length. Given: {tokens}")


async def _cut(tokenize: Tokenize, text: str, tokens: int) -> Prompt | None:
    """The head of `text` that has `tokens` tokens: a text cut inside a word may be tokenised differently, hence the loop."""
    pieces = await tokenize(text)
    last = tokens - 1
    for _ in range(_CUTS):
        if not 0 <= last < len(pieces) or not pieces[last].stop:
            return None
        head = text[: pieces[last].stop]
        ids = tuple(piece.id for piece in await tokenize(head))
        if len(ids) == tokens:
            return Prompt(head, ids)
        last += tokens - len(ids)
    return None


def choose(popularity: Popularity, adapters: Sequence[str], count: int, random: Random) -> list[str | None]:
    """The adapter of each of `count` requests; without adapters, the base model for all."""
    if not adapters:
        return [None] * count
    if popularity == "distinct":
        return [adapters[index % len(adapters)] for index in range(count)]
    if popularity == "identical":
        return [adapters[0]] * count
    weights = [(rank + 1) ** -ZIPF if popularity == "zipf" else 1.0 for rank in range(len(adapters))]
    return list(random.choices(adapters, weights, k=count))


def make_orders(prompts: Sequence[Prompt], adapters: Sequence[str | None], max_new_tokens: int) -> list[Order]:
    return [Order(prompt, adapter, max_new_tokens) for prompt, adapter in zip(prompts, adapters, strict=True)]
