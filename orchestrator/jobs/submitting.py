"""Submit a campaign to a cluster as a job, or attach to the job that runs it already."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config import CampaignConfig, config_from_dict, override_config
from orchestrator.jobs.bundle import CAMPAIGN_FILE, Bundle, bundle_campaign
from orchestrator.jobs.cluster import Cluster, Job, JobExistsError
from workers.errors import BadInputError
from workers.secrecy import is_secret_name, secret_in
from workers.storage import StorageError, open_store

ENTRYPOINT = f"python -m orchestrator.cli run {CAMPAIGN_FILE} address=auto"
ID_DIGITS = 8
"""Of the hash of the campaign's place, which tells campaigns of one name in different stores apart."""


_ON_NODES = (
    "which everybody who may see the cluster's jobs could read: nodes have credentials of their own (an "
    "instance's role, a mounted secret, their environment)"
)


@dataclass(frozen=True)
class Submission:
    """A campaign's job."""

    job: Job
    attached: bool
    """Whether the job was there already."""
    same_configuration: bool
    """Whether it was started with the configuration that is asked for now."""


def submit_campaign(
    config: CampaignConfig,
    cluster: Cluster,
    note: Callable[[str], None],
    *,
    installed: bool = False,
    unchecked: bool = False,
    assignments: Sequence[str] = (),
) -> Submission:
    """Start the campaign on the cluster, unless a job of it waits or runs there: then that one.

    `note` is told what had better be known. Raises `BadInputError` for a campaign that cannot work, as far
    as this machine can see it (not at all if `unchecked`), and `ClusterError` if the cluster refuses it.
    """
    environment = chosen_environment(assignments)
    bundle = bundle_campaign(config)
    if not unchecked:
        check_here(bundle, note)
    store = open_store(bundle.config.store).substore(bundle.config.name)
    if places := bundle.left_on_nodes:
        note(f"every node must have these itself, and share the store: {', '.join(places)}")
    configuration = hashlib.sha256(bundle.text.encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory(prefix="darwin-job-") as made:
        folder: Path | None = None
        while True:
            known = cluster.jobs_of(store.uri)
            active = next((job for job in reversed(known) if job.is_active), None)
            if active is not None:
                return Submission(active, True, active.configuration == configuration)
            number = max((job.number for job in known), default=0) + 1
            job = new_job(bundle.config.name, store.uri, number, configuration)
            if folder is None:
                folder = Path(made)
                bundle.write(folder, with_code=not installed)
            try:
                cluster.submit(job, ENTRYPOINT, folder, environment, bundle.config.driver)
            except JobExistsError:
                continue  # somebody else was quicker: that job is looked at next
            return Submission(job, False, True)


def new_job(name: str, campaign: str, number: int, configuration: str) -> Job:
    """A job that is not submitted yet. Its id is the same whoever submits, so that only one can."""
    place = hashlib.sha256(campaign.encode()).hexdigest()[:ID_DIGITS]
    return Job(
        id=f"darwin-{name}-{place}-{number}",
        campaign=campaign,
        number=number,
        configuration=configuration,
        ray_status="PENDING",
        message="",
        exit_code=None,
        started=None,
    )


def check_here(bundle: Bundle, note: Callable[[str], None]) -> None:
    """Raise `BadInputError` as a driver would, for what this machine can see of the campaign."""
    from orchestrator.campaign import Campaign

    config = bundle.config
    absent = [
        place
        for place in bundle.left_on_nodes
        if place != config.store and not any(map(os.path.lexists, (place, place.split("+")[0])))
    ]
    if absent:
        note(f"not checked here, as {absent[0]} is not on this machine")
        return
    try:
        Campaign(config, Unwatched())
    except StorageError as error:
        note(f"not checked here: {error}")


class Unwatched:
    """A watcher of a campaign that is only looked at."""

    def begin(self, campaign: object) -> None: ...
    def stage(self, name: str) -> None: ...
    def notify(self, campaign: object) -> None: ...
    def happened(self, campaign: object, event: Mapping[str, object]) -> None: ...


def recorded_campaign(place: str, overrides: Sequence[str]) -> CampaignConfig:
    """The configuration that the campaign at STORE/NAME ran with last, with `key=value` changes.

    Raises `BadInputError` if there is none, or a change cannot be.
    """
    from orchestrator.ledger.ledger import Ledger
    from orchestrator.ledger.record_shapes import campaign_records
    from orchestrator.overview import open_campaign_store

    store = open_campaign_store(place)
    begun = Ledger(store, lambda record: None, campaign_records()).last("campaign")
    if begun is None:
        raise BadInputError(
            f"{store.uri}: the campaign was stopped before it began: submit it again"
        )
    config = config_from_dict(begun["config"], f"{store.uri}: its ledger")
    # A campaign's folder may have been moved.
    config.store, _, config.name = store.uri.rpartition("/")
    return override_config(config, list(overrides), store.uri)


def chosen_environment(assignments: Iterable[str]) -> dict[str, str]:
    """The variables of `NAME=VALUE`. Raises `BadInputError` for what is named like a secret, or holds one."""
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise BadInputError(f"--env {name!r} is not NAME=VALUE")
        if is_secret_name(name):
            raise BadInputError(f"--env {name}: has the name of a secret, {_ON_NODES}")
        if secret := secret_in(value):
            raise BadInputError(f"--env {name}: holds {secret}, {_ON_NODES}")
        found[name] = value
    return found
