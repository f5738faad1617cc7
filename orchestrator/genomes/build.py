"""A campaign's genome space, of whichever kind its file is."""

from __future__ import annotations

from orchestrator.config import GenomeConfig
from orchestrator.genomes.expert_file import is_expert_file
from orchestrator.genomes.expert_genes import build_expert_space
from orchestrator.genomes.parameter_space import build_parameter_space
from orchestrator.genomes.ratio_file import is_ratio_file
from orchestrator.genomes.ratio_genes import build_ratio_space
from orchestrator.genomes.space import Space
from orchestrator.mri.prescription import Prescription
from workers.checkpoints import ArchitectureMap
from workers.merging import ParentReference


def build_space(
    config: GenomeConfig,
    father: ArchitectureMap,
    parents: tuple[ParentReference, ...],
    base: ParentReference | None,
    seed: int,
    scans: bool = False,
    prescription: Prescription | None = None,
    probes: bool = False,
) -> Space:
    """Make the configured space for these parents. Raises `BadInputError` naming file and key.

    `scans`: whether the campaign scans the parents, `probes`: whether it also runs them; `prescription`: what
    the scan has advised. Without it a space that needs one is made for what can be known before.
    """
    if is_expert_file(config):
        return build_expert_space(config, father, parents, base, seed, probes, prescription)
    if is_ratio_file(config):
        return build_ratio_space(config, father, parents, base, seed, scans, prescription)
    return build_parameter_space(config, father, parents, base, seed)
