"""A campaign followed from its store: what its ledger says, and whether a driver is alive, as it changes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from orchestrator.config import CampaignConfig, config_from_dict
from orchestrator.ledger.lease import KEY as LEASE_KEY
from orchestrator.ledger.lease import LIFETIME_SECONDS
from orchestrator.ledger.ledger import Ledger, Record
from orchestrator.ledger.record_shapes import campaign_records
from orchestrator.ledger.state import CampaignState
from orchestrator.objectives import task_weights
from orchestrator.overview import open_campaign_store, overview_of
from orchestrator.watching.pace import Pace
from workers.errors import BadInputError
from workers.storage import ObjectNotFoundError, Store

POLL_SECONDS = 2.0

LIST_SECONDS = 30.0
"""So often the ledger is listed; in between it is only asked for the next record."""


class LeaseSign:
    """Whether a driver shows signs of life: its lease changes every few seconds of our own time."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._version: str | None = None
        self._changed = clock()

    def look(self) -> str:
        """`running`, `gone` (the lease was released, or there is none) or `silent`."""
        try:
            data, version = self._store.read_with_version(LEASE_KEY)
            owner = json.loads(data)["owner"]
        except (ObjectNotFoundError, ValueError, TypeError, KeyError):
            return "gone"
        if owner is None:
            return "gone"
        if version != self._version:
            self._version, self._changed = version, self._clock()
        return "silent" if self._clock() - self._changed > LIFETIME_SECONDS else "running"


class Follower:
    """Reads a campaign's ledger once, and from then on what is new."""

    def __init__(self, place: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._store = store = open_campaign_store(place)
        self.pace = Pace()
        self.state = CampaignState("mean")  # until the objective is known
        self.config: CampaignConfig | None = None
        self._ledger = Ledger(store, self._take_in, check=campaign_records())
        self._driver = LeaseSign(store, clock)
        self._listed = clock()
        if self.config is None:
            raise BadInputError(f"{store.uri}: the campaign was stopped before it began")

    def _take_in(self, record: Record) -> None:
        self.state.apply(record)
        self.pace.apply(record)
        if record["kind"] == "campaign":  # once more with a larger budget
            self.config = config_from_dict(record["config"], f"{self._store.uri}: its ledger")
            self.state.judge_by(self.config.objective, task_weights(self.config))

    def poll(self) -> bool:
        """Read what is new; whether there was anything."""
        known = len(self._ledger.records)
        # Asking for the next record costs one request. It is not enough: it may be in a segment by now.
        if self._clock() - self._listed >= LIST_SECONDS or self._ledger.has_next():
            self._listed = self._clock()
            self._ledger.read_on()
        return len(self._ledger.records) > known

    def overview(self) -> dict[str, Any]:
        """Where the campaign stands; see `campaign_overview`, with its pace and its driver."""
        assert self.config is not None
        found = overview_of(self._ledger, self.config, self.state)
        left = max(0, found["budget"] - found["evaluations"])
        driver = None if found["status"] != "unfinished" else self._driver.look()
        pace = self.pace.to_dict(left)
        if driver != "running":
            pace |= {"items_per_second": None, "candidates_per_hour": None, "seconds_left": None}
        return {**found, **pace, "driver": driver}


def follow(
    place: str, wait: Callable[[float], None] = time.sleep
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The overview every few seconds until the campaign has come to its end, and whether it is news.

    Raises `BadInputError` if there is no campaign, or it has not begun yet.
    """
    follower = Follower(place)
    known = None
    while True:
        overview = follower.overview()
        yield overview, overview != known
        if overview["status"] != "unfinished":
            return
        known = overview
        wait(POLL_SECONDS)
        follower.poll()
