"""Everybody who is told how a campaign goes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from orchestrator.campaign import Campaign, Watcher
from orchestrator.config import CampaignConfig
from orchestrator.console import leave_errors_to_log
from orchestrator.progress import ProgressView
from orchestrator.watching.json_log import JsonLog
from orchestrator.watching.metrics import Metrics


class Watchers:
    """Several watchers as one."""

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers

    def begin(self, campaign: Campaign) -> None:
        """See `Watcher`."""
        for watcher in self.watchers:
            watcher.begin(campaign)

    def stage(self, name: str) -> None:
        """See `Watcher`."""
        for watcher in self.watchers:
            watcher.stage(name)

    def notify(self, campaign: Campaign) -> None:
        """See `Watcher`."""
        for watcher in self.watchers:
            watcher.notify(campaign)

    def happened(self, campaign: Campaign, event: Mapping[str, Any]) -> None:
        """See `Watcher`."""
        for watcher in self.watchers:
            watcher.happened(campaign, event)


@contextmanager
def watching(config: CampaignConfig, log_file: str | None = None) -> Iterator[Watchers]:
    """Who watches a campaign that `darwin run` runs: people or a log on standard error, Ray's metrics, and a
    log in a file if one is named."""
    with ExitStack() as stack:
        watchers: list[Watcher] = [Metrics()]
        if log_file is not None:
            watchers.append(stack.enter_context(JsonLog.to_file(log_file)))
        if config.log == "json":
            leave_errors_to_log()
            watchers.append(stack.enter_context(JsonLog(sys.stderr)))
        else:
            watchers.append(stack.enter_context(ProgressView()))
        yield Watchers(*watchers)
