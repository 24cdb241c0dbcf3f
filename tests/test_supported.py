"""The README's tables are what the code serves, no more and no less."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftType

from server.checkpoints.adapterhub_fields import ARCHITECTURES, HEADS
from server.checkpoints.peft import READERS
from server.checkpoints.peft_fields import CLASSES
from server.methods import METHODS
from server.supported import BEGIN, END, OWN, families, markdown, updated

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_readmes_tables_are_made_from_the_code() -> None:
    text = README.read_text(encoding="utf-8")
    assert updated(text) == text, "run: adapterd methods --update README.md"


def test_every_family_says_what_it_is_what_it_is_read_from_and_how_it_is_served() -> None:
    listed = list(families())
    assert [family.name for family in listed] == list(METHODS)
    for family in listed:
        assert all((family.summary, family.sources, family.served)), family


def test_every_source_of_every_dialect_is_listed() -> None:
    sources = " ".join(family.sources for family in families())
    for kind in READERS:
        assert f"`{kind}`" in sources
    for name in {*ARCHITECTURES, *HEADS} - {"union"}:
        assert f"`{name}`" in sources or (name is None and "AdapterHub bottleneck" in sources)


def test_our_own_formats_are_those_that_peft_does_not_write() -> None:
    assert {kind for kind in READERS if kind not in PeftType.__members__} == OWN


def test_every_field_is_in_the_table_of_its_dialect() -> None:
    rows = {line.split("|")[1].strip(): line for line in markdown().splitlines() if line.startswith(("| PEFT", "| own"))}
    for kind in READERS:
        row = rows[f"{'own' if kind in OWN else 'PEFT'} `{kind}`"]
        for field in {*CLASSES[kind].honoured, *CLASSES[kind].refused} - {"peft_type"}:
            assert f"`{field}`" in row


def test_only_what_is_between_the_markers_is_made_anew() -> None:
    assert updated(f"before\n{BEGIN}\nold\n{END}\nafter\n") == f"before\n{BEGIN}\n\n{markdown()}\n\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}\n{BEGIN}"])
def test_a_readme_without_markers_is_left_alone(text: str) -> None:
    with pytest.raises(ValueError, match="needs a line"):
        updated(text)
