"""The campaign's stage between its parents and its search: the scan, and what became of the genome space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

from orchestrator.config import CampaignConfig
from orchestrator.genomes.expert_space import ExpertSpace
from orchestrator.genomes.space import Space
from orchestrator.inputs import Inputs
from orchestrator.ledger.ledger import Ledger
from orchestrator.mri.expert_prescription import prescribe_experts
from orchestrator.mri.experts import keep_routing
from orchestrator.mri.matched_scan import at_matched_places
from orchestrator.mri.prescription import Prescription, prescribe
from orchestrator.pool.calls import Calls
from workers.merging.expert_order import ExpertOrders, orders_to_dict
from workers.storage import Store, open_store
from workers.storage.documents import damage_named


class Recorder(Protocol):
    """Writes a record of a kind into the ledger."""

    def __call__(self, kind: str, **content: Any) -> None: ...


def recorded_or_scanned(
    config: CampaignConfig,
    inputs: Inputs,
    space: Space,
    ledger: Ledger,
    record: Recorder,
    calls: Calls,
    stage: Callable[[str], None],
    orders: ExpertOrders | None = None,
) -> Prescription:
    """The prescription that the space waits for: the ledger's, or a new one that is recorded first.

    Scans are kept in the store that campaigns lie in, by the content of the parents. `orders`: where experts
    of donors belong, if they are not at their places.
    """
    base = inputs.base_reference
    of = {
        "parents": [asdict(reference) for reference in inputs.references],
        "base": asdict(base) if base else None,
        "scan": asdict(config.scan)
        | {"sets": {prompts.name: prompts.sha256 for prompts in inputs.calibration}},
        "space": space.identity,
    } | ({"experts": orders_to_dict(orders)} if orders else {})
    for known in ledger.of_kind("prescription"):
        if known["of"] == of:
            with damage_named(f"{ledger.store.uri}: its record of a prescription"):
                return Prescription.from_dict(known["prescription"])
    stage("scanning the parents")
    prescription = scan_and_prescribe(
        config, inputs, space, calls, open_store(config.store), orders, ledger.store
    )
    record("prescription", of=of, prescription=prescription.to_dict())
    return prescription


def scan_and_prescribe(
    config: CampaignConfig,
    inputs: Inputs,
    space: Space,
    calls: Calls,
    store: Store | None,
    orders: ExpertOrders | None = None,
    campaign: Store | None = None,
) -> Prescription:
    """What the configured scan advises for `space`, by tensor or by expert; the scan is kept in `store`, and
    what it says of experts in the `campaign`'s, for its report."""
    from orchestrator.mri.probe import ActivationProbe, shards_for
    from orchestrator.mri.scan import scan_parents

    probe = None
    if config.scan.probe:
        shards = shards_for(inputs.parents, config.workers.total)
        probe = ActivationProbe(inputs.calibration, device=config.engine.device, shards=shards)
    scan = scan_parents(inputs.parents, inputs.base, calls, store, probe)
    if campaign is not None:
        keep_routing(scan, campaign)
    if orders:
        scan = scan | {"static": at_matched_places(scan["static"], orders)}
    if isinstance(space, ExpertSpace):
        return prescribe_experts(scan, orders)
    if not config.scan.static:
        scan = scan | {"static": [row | {"of": {}} for row in scan["static"]]}
    return prescribe(scan, space.to_prescribe, config.scan.alpha)


def describe_space(space: Space, prescription: Prescription | None) -> dict[str, Any]:
    """What the lineage says of a genome space: its genes, those not searched, and what the scan told."""
    described: dict[str, Any] = {
        "genes": [gene.name for gene in space.genes],
        "removed": [gene.to_dict() for gene in space.removed],
        "scan": None,
    }
    if prescription:
        described["scan"] = {
            "tensors": len(prescription.shares),
            "dispersion": prescription.dispersion,
            "is_telling": prescription.is_telling,
            "equal_tensors": len(prescription.equal),
        }
    if isinstance(space, ExpertSpace):
        described["bands"] = space.bands
        if prescription:
            described["scan"]["experts"] = prescription.advised_experts
    return described


def notes_on_search(search: dict[str, Any]) -> list[str]:
    """What card and report say of a lineage's search beyond its numbers, a sentence each."""
    notes = []
    space = search.get("space") or {}
    scan = space.get("scan")
    if scan:
        what = f"{scan['experts']} experts" if "experts" in scan else f"{scan['tensors']} tensors"
        found = f"shares for {what} that spread by {scan['dispersion']:g}"
        notes.append(
            f"The scan of the parents advises {found}."
            if scan["is_telling"]
            else f"The scan of the parents tells nothing: it advises {found}, so no gene trusts it."
        )
    reasons: dict[str, list[str]] = {}
    for gene in space.get("removed", []):
        reasons.setdefault(gene["reason"], []).append(gene["gene"])
    if reasons:
        listed = "; ".join(f"{', '.join(genes)} ({reason})" for reason, genes in reasons.items())
        notes.append(f"Genes that cannot matter here and were not searched: {listed}.")
    if search.get("flat"):
        notes.append(f"The search was stopped early: {search['ended']}.")
    return notes
