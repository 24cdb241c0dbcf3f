"""A scenario's verdict as plain data: named figures, and for those that have a goal whether they meet it.

Owns the comparison with the goal. Never measures and never prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Literal

from .results import Spread

#: How a figure is shown: seconds as ms, a share as a percentage, a ratio or a count as it is.
Unit = Literal["s", "tokens/s", "share", "ratio", "count"]


@dataclass(frozen=True)
class Figure:
    """One number. `most` and `least` are its goal; without either it only informs. `spread` is over the run's rounds."""

    name: str
    value: float
    unit: Unit
    most: float | None = None
    least: float | None = None
    spread: Spread | None = None

    @property
    def met(self) -> bool | None:
        """None without a goal; a figure that is no number meets none."""
        if self.most is None and self.least is None:
            return None
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)

    @classmethod
    def over(
        cls, name: str, values: Sequence[float], unit: Unit, *, most: float | None = None, least: float | None = None
    ) -> Figure:
        """The median of one value per round; no number when there is no round."""
        if not values:
            return cls(name, nan, unit, most, least)
        spread = Spread.of(values)
        return cls(name, spread.median, unit, most, least, spread)


@dataclass(frozen=True)
class Verdict:
    """What a scenario found. `rounds` holds what the figures were made from, for the JSON report."""

    title: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()
    rounds: tuple[Mapping[str, object], ...] = ()

    @property
    def met(self) -> bool:
        """Every goal."""
        return all(figure.met is not False for figure in self.figures)
