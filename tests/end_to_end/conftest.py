"""Fixtures that several tests of whole campaigns share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.campaigns import run_darwin, write_campaign
from tests.ray_cluster import RayCluster


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the small campaign, run to its end in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_darwin("run", str(write_campaign(folder)))


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Of a cluster for campaigns that need none of their own: each would take seconds to start. Whoever
    joins it has its `ENVIRONMENT`."""
    with RayCluster(2) as cluster:
        yield cluster.address
