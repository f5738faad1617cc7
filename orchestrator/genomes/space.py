"""What every genome space is: named, bounded genes, and the decoding of a genome to a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from orchestrator.genomes.parameter_file import DECIMALS
from workers.merging import MergeMethod, Recipe


@dataclass(frozen=True, slots=True)
class Gene:
    """One number that the search varies."""

    name: str
    low: float
    high: float
    start: float


@dataclass(frozen=True, slots=True)
class RemovedGene:
    """A gene of the space that is not searched, because it cannot matter here."""

    gene: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


class Space(Protocol):
    """A space made for certain parents."""

    @property
    def method(self) -> MergeMethod: ...

    @property
    def genes(self) -> tuple[Gene, ...]:
        """Those that are searched; with none of them there is a single candidate."""

    @property
    def removed(self) -> tuple[RemovedGene, ...]: ...

    @property
    def to_prescribe(self) -> tuple[str, ...]:
        """Tensors whose shares a scan must prescribe before the space is complete; none: it is."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a search in this space depends on, wherever its file lies; not what a scan will find."""

    @property
    def start(self) -> list[float]:
        """Where a search begins, in the unit cube."""

    def point(self, unit: Sequence[float]) -> dict[str, float]:
        """The genome at a point of the unit cube, one coordinate per gene in order."""

    def decode(self, genome: dict[str, float]) -> Recipe:
        """The recipe of a genome. Tensors that it is not about stay the father's."""


def start_of(genes: Sequence[Gene]) -> list[float]:
    """The genes' starting values, in the unit cube."""
    return [(gene.start - gene.low) / (gene.high - gene.low) for gene in genes]


def point_of(genes: Sequence[Gene], unit: Sequence[float]) -> dict[str, float]:
    """The genome at a point of the unit cube."""
    return {  # + 0.0 makes -0.0 and 0.0, which are equal but not written alike, one
        gene.name: round(gene.low + (gene.high - gene.low) * coordinate, DECIMALS) + 0.0
        for gene, coordinate in zip(genes, unit, strict=True)
    }
