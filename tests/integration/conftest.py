"""Fixtures that several integration tests share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.campaigns import run_darwin, write_campaign


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the small campaign, run to its end in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_darwin("run", str(write_campaign(folder)))
