"""What `darwin status` and `darwin inspect` show, as data and as text."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from orchestrator.config import CampaignConfig, config_from_dict
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.state import CampaignState, read_campaign
from orchestrator.objectives import task_weights
from orchestrator.pareto_search import front_record
from orchestrator.places import open_parent
from orchestrator.racing.record import saved_text
from orchestrator.watching.spending import cost_words
from workers.checkpoints import COMPONENTS, ArchitectureMap
from workers.errors import BadInputError
from workers.storage import Store, open_store
from workers.storage.documents import damage_named


def open_campaign_store(place: str) -> Store:
    """The store of the campaign at `STORE/NAME`. Raises `BadInputError` if there is none."""
    store = open_store(place.rstrip("/"))
    if next(store.list_objects("ledger/"), None) is None:
        raise BadInputError(f"{store.uri}: there is no campaign here")
    return store


def campaign_overview(place: str) -> dict[str, Any]:
    """Where the campaign stands, from its ledger."""
    store = open_campaign_store(place)
    with damage_named(f"{store.uri}: its ledger"):
        ledger, state = read_campaign(store)
        begun = ledger.last("campaign")
        if begun is None:
            raise BadInputError(f"{store.uri}: the campaign was stopped before it began")
        config = config_from_dict(begun["config"], f"{store.uri}: its ledger")
        state.judge_by(config.objective, task_weights(config))
        return overview_of(ledger, config, state)


def overview_of(ledger: Ledger, config: CampaignConfig, state: CampaignState) -> dict[str, Any]:
    """The same, from what was read of the ledger."""
    store, budget, result = ledger.store, config.search.evaluations, ledger.result()
    best, evaluated = state.best(budget), state.evaluated(budget)
    return {
        "status": result["status"] if result else "unfinished",
        "campaign": store.uri,
        "generation": len(state.generations),
        "round": max(state.rounds, default=1),
        "rounds": config.breeding.rounds,
        "evaluations": evaluated,
        "budget": budget,
        "racing": state.races.to_dict(),
        "failures": state.failures,
        "cost": state.spending.to_dict(evaluated),
        "best": {"recipe_id": best[0].recipe_id, "fitness": best[1], "genome": best[0].genome}
        if best
        else None,
        "steady": state.is_steady,
        "front": _front(state, config) if best and config.objective == "pareto" else None,
        "drivers": sum(1 for _ in ledger.of_kind("epoch")),
        "child": result["child"] if result else None,
        "holdout_fitness": result["holdout_fitness"] if result else None,
        "gates": result.get("gates") if result else None,
        "reasons": result.get("reasons") if result else None,
        "report": result["report"] if result else None,
    }


def _front(state: CampaignState, config: CampaignConfig) -> dict[str, Any]:
    """The Pareto front as it stands: its hypervolume, and each member's recipe and scores."""
    front = front_record(state, config, {})
    return {
        "hypervolume": front["hypervolume"],
        "members": [{"recipe_id": m["recipe"], **m["scores"]} for m in front["members"]],
    }


def render_overview(overview: dict[str, Any]) -> Table:
    """The overview for a person, a row for each fact."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # a place is never cut short
    best = overview["best"]
    table.add_row("campaign", overview["campaign"])
    table.add_row("status", overview["status"])
    for reason in overview["reasons"] or ():
        table.add_row("rejected for", reason)
    begun = f"{'asks' if overview['steady'] else 'generation'} {overview['generation']}"
    table.add_row(
        "evaluations",
        f"{overview['evaluations']} of {overview['budget']}, {begun}, "
        f"{overview['failures']} failures, {_count(overview['drivers'], 'driver start')}",
    )
    if overview["racing"]:
        table.add_row("racing", saved_text(overview["racing"]))
    if overview["rounds"] > 1:
        table.add_row("round", f"{overview['round']} of {overview['rounds']}")
    if overview["cost"]:
        table.add_row("cost", cost_words(overview["cost"]))
    table.add_row("best fitness", f"{best['fitness']:.3f}" if best else "none yet")
    if front := overview["front"]:
        size = _count(len(front["members"]), "member")
        table.add_row("Pareto front", f"{size}, hypervolume {front['hypervolume']:.4f}")
    if overview["holdout_fitness"]:
        scores = ", ".join(f"{name} {v:.3f}" for name, v in overview["holdout_fitness"].items())
        table.add_row("held out", scores)
        table.add_row("child", overview["child"])
        table.add_row("report", overview["report"])
    return table


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number != 1 else ''}"


def checkpoint_overview(location: str) -> dict[str, Any]:
    """The architecture map of a checkpoint, summed up per component."""
    checkpoint = open_parent(location)
    mapped = ArchitectureMap(checkpoint)
    components: dict[str, dict[str, Any]] = {}
    for component in COMPONENTS:
        tensors = [tensor for tensor in mapped.tensors if tensor.component == component]
        if not tensors:
            continue
        stored = {tensor.stored for tensor in tensors}
        entries = [checkpoint.tensors[name] for name in stored]
        components[component] = {
            "tensors": len(stored),
            "parameters": sum(tensor.elements for tensor in tensors),
            "bytes": sum(entry.stop - entry.start for entry in entries),
            "dtypes": sorted({tensor.dtype for tensor in tensors}),
            "layers": len({tensor.layer for tensor in tensors} - {None}),
        }
    return {
        "status": "done",
        "checkpoint": checkpoint.location,
        "model_type": mapped.model_type,
        "layers": mapped.layers,
        "experts": mapped.experts,
        "quantization": mapped.quantization,
        "scale_tensors": len(mapped.scales),
        "adapter": None
        if checkpoint.adapter is None
        else {
            "location": checkpoint.adapter.location,
            "ranks": sorted({update.rank for update in checkpoint.adapter.low_rank.values()}),
            "adapted_tensors": sum(tensor.change is not None for tensor in mapped.tensors),
        },
        "files": len(checkpoint.weight_files),
        "tensors": len(checkpoint.tensors),
        "parameters": sum(tensor.elements for tensor in mapped.tensors),
        "bytes": checkpoint.total_bytes,
        "fingerprint": checkpoint.fingerprint,
        "components": components,
        "unknown": mapped.unknown,
    }


def render_checkpoint(overview: dict[str, Any]) -> RenderableType:
    """The map for a person."""
    experts = f", {overview['experts']} experts a layer" if overview["experts"] else ""
    heading = (
        f"{overview['checkpoint']}\n{overview['model_type']}: {overview['layers']} layers{experts}, "
        f"{overview['parameters']:,} parameters, {overview['bytes']:,} bytes, "
        f"{overview['tensors']} tensors in {overview['files']} files\n"
        f"fingerprint {overview['fingerprint'][:16]}\n"
    )
    if overview["quantization"]:
        heading += (
            f"quantized: {overview['quantization']}, {overview['scale_tensors']} scale tensors\n"
        )
    if adapter := overview["adapter"]:
        ranks = "".join(f"rank {rank}, " for rank in adapter["ranks"])
        heading += f"adapter: {ranks}tensors changed: {adapter['adapted_tensors']}\n"
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("component")
    for name in ("tensors", "layers", "parameters", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("dtypes")
    for component, row in overview["components"].items():
        table.add_row(
            component,
            str(row["tensors"]),
            str(row["layers"] or ""),
            f"{row['parameters']:,}",
            f"{row['bytes']:,}",
            ", ".join(row["dtypes"]),
        )
    parts: list[RenderableType] = [heading, table]
    if overview["unknown"]:
        # A name is whatever the file says, also what would command a terminal.
        names = "\n".join(
            f"  {name if name.isprintable() else ascii(name)}" for name in overview["unknown"]
        )
        parts.append(f"\nunknown tensors (a merge carries them from the father):\n{names}")
    return Group(*parts)
