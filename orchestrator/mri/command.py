"""`darwin scan`: the model MRI of checkpoints, without a campaign."""

from __future__ import annotations

from typing import Any

from orchestrator.mri.page import build_page
from orchestrator.mri.scan import Probe, find_scan, scan_bytes, scan_key, scan_parents
from orchestrator.places import open_parent
from orchestrator.pool.calls import open_calls
from orchestrator.progress_bar import progress_bar
from orchestrator.workers_config import WorkersConfig
from workers.checkpoints import Checkpoint
from workers.errors import BadInputError
from workers.merging.plan import BASE
from workers.storage import open_store

ROLES = ("father", "mother", "donor")


def scan_checkpoints(
    locations: list[str],
    base: str | None,
    out: str,
    workers: WorkersConfig | None = None,
    address: str | None = None,
    probe: Probe | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Scan the parents at these places, the father's first, and the `base`, into the store `out`.

    The scan, and where it and its page lie. What `out` holds already is not made again. With `workers`,
    actors scan on the Ray cluster at `address`, or on this machine; else processes of this one.
    """
    parents = name_parents([open_parent(location) for location in locations])
    opened = open_parent(base) if base else None
    store = open_store(out)
    key = scan_key(parents, opened, probe)
    page = key.removesuffix(".json") + ".html"
    scan = find_scan(parents, opened, store, probe)
    if scan is None:
        with (
            open_calls(parents, opened, workers, address) as calls,
            progress_bar("scanning", scan_bytes(parents, opened)) as notify,
        ):
            scan = scan_parents(parents, opened, calls, store, probe, notify)
    lying = {
        name: one.location for name, one in (parents | ({BASE: opened} if opened else {})).items()
    }
    store.write(page, build_page(scan, lying).encode())
    return scan, {"scan": f"{store.uri}/{key}", "page": f"{store.uri}/{page}"}


def name_parents(checkpoints: list[Checkpoint]) -> dict[str, Checkpoint]:
    """Parents by their roles: father, mother, donor, donor2, ..."""
    if not checkpoints:
        raise BadInputError("name at least one checkpoint to scan")
    names = [*ROLES, *(f"{ROLES[-1]}{number}" for number in range(2, len(checkpoints)))]
    return dict(zip(names, checkpoints, strict=False))
