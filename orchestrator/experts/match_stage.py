"""The campaign's stage that matches the donors' experts with the father's, before anything is searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from orchestrator.config import CampaignConfig
from orchestrator.experts.matching import Matching, match_experts
from orchestrator.inputs import Inputs
from orchestrator.ledger.ledger import Ledger
from orchestrator.mri.prescribing import Recorder
from orchestrator.pool.calls import Calls
from workers.checkpoints import ArchitectureMap
from workers.errors import BadInputError
from workers.merging import Recipe
from workers.merging.expert_order import experts_by_layer
from workers.storage.documents import damage_named


def check_can_match(config: CampaignConfig, father: ArchitectureMap) -> None:
    """Raise `BadInputError` if experts are to be matched, and there are none."""
    if config.experts.match != "none" and not experts_by_layer(father):
        raise BadInputError(
            f"experts.match: {father.location} has no routed experts that could be matched: set it to none"
        )


def recorded_or_matched(
    config: CampaignConfig,
    inputs: Inputs,
    ledger: Ledger,
    record: Recorder,
    calls: Calls,
    stage: Callable[[str], None],
) -> Matching | None:
    """The matching that the campaign goes by: the ledger's, or a new one that is recorded first.

    None if the campaign pairs experts by their numbers.
    """
    by = config.experts.match
    if by == "none":
        return None
    of = {
        "parents": [asdict(reference) for reference in inputs.references],
        "by": by,
        "sets": {prompts.name: prompts.sha256 for prompts in inputs.expert_prompts},
    }
    for known in ledger.of_kind("matching"):
        if known["of"] == of:
            with damage_named(f"{ledger.store.uri}: its record of a matching"):
                return Matching.from_dict(known["matching"], list(inputs.parents))
    stage(f"matching the experts by {by}")
    found = match_experts(inputs.parents, by, inputs.expert_prompts, calls, config.engine.device)
    record("matching", of=of, matching=found.to_dict())
    for note in found.notes:
        stage(note)
    return found


def paired(recipe: Recipe, matching: Matching | None) -> Recipe:
    """The recipe with the experts paired as they were matched."""
    return recipe if matching is None else replace(recipe, experts=matching.orders)
