"""Stop a campaign's driver, wherever it runs: it saves its state, and the campaign can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from orchestrator.errors import CampaignError
from orchestrator.jobs.cluster import STOP_SECONDS, Cluster, Job
from orchestrator.ledger import lease as leases
from orchestrator.ledger.lease import Sighting, look_at_lease
from orchestrator.ledger.ledger import FOLDER
from orchestrator.ledger.stop_request import request_stop
from workers.errors import BadInputError
from workers.storage import Store

ANSWER_SECONDS = 60.0
"""So long a driver may take from the request to the end of what it is at."""
ENDING_SECONDS = 60.0
"""So long a job may take to end after its driver has let go of the campaign."""
POLL_SECONDS = 0.25


def stop_campaign(
    store: Store, cluster: Cluster | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Ask the campaign's driver to stop, and wait until it has; with a `cluster`, end its job there, too.

    The request goes through the store, so the driver may run anywhere. A job whose driver does not answer,
    or was not started yet, is ended by Ray. Raises `BadInputError` if there is no such campaign, and
    `CampaignError` if its driver goes on.
    """
    seen = look_at_lease(store)
    job = cluster.active_job(store.uri) if cluster else None
    if seen is None and job is None and next(store.list_objects(f"{FOLDER}/"), None) is None:
        place = f", nor does {cluster.address} run one" if cluster else ""
        raise BadInputError(f"{store.uri}: there is no campaign here{place}")
    outcome = "not running"
    if seen is not None and seen.may_live:
        outcome = _ask(store, seen, say)
    if cluster is not None and job is not None:
        job = _end(cluster, job, at_once=outcome != "stopped", say=say)
        outcome = "stopped"
    elif seen is not None and outcome == "goes on":
        raise CampaignError(
            f"{store.uri}: its driver (process {seen.process} on {seen.host}) was asked to stop, but has "
            f"not within {ANSWER_SECONDS:.0f} s; it will when what it is at has come to an end. If that "
            "takes too long, end that process, or give the --address of the cluster that runs its job"
        )
    return {
        "status": "stopped",
        "campaign": store.uri,
        "driver": outcome,
        "job": job.to_dict() if job else None,
    }


def _ask(store: Store, seen: Sighting, say: Callable[[str], None]) -> str:
    """Leave a request, and wait for what comes of it: `stopped`, `no sign of life`, or `goes on`."""
    say(f"asking the driver (process {seen.process} on {seen.host}) to stop")
    request_stop(store, seen.epoch, seen.token or "")
    begun = changed = time.monotonic()
    latest = seen
    while time.monotonic() - begun < ANSWER_SECONDS:
        time.sleep(POLL_SECONDS)
        found = look_at_lease(store)
        if found is None or not found.may_live or found.epoch != seen.epoch:
            return "stopped"
        if found.version != latest.version:
            latest, changed = found, time.monotonic()
        elif time.monotonic() - changed > leases.LIFETIME_SECONDS:
            return "no sign of life"
    return "goes on"


def _end(cluster: Cluster, job: Job, at_once: bool, say: Callable[[str], None]) -> Job:
    """Wait until a job has ended by itself; one that does not is ended. The job as it ended."""
    if not at_once:
        job = _await_end(cluster, job, ENDING_SECONDS)
    if job.is_active:
        say(f"ending the job {job.id}")
        cluster.stop(job.id)
        job = _await_end(cluster, job, STOP_SECONDS + ENDING_SECONDS)
    if job.is_active:
        raise CampaignError(
            f"{cluster.address}: the job {job.id} is still {job.ray_status}, though Ray was told to end it"
        )
    return job


def _await_end(cluster: Cluster, job: Job, seconds: float) -> Job:
    deadline = time.monotonic() + seconds
    while job.is_active and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        job = cluster.read(job.id)
    return job
