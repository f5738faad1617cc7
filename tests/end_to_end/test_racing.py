"""A raced campaign on real workers, killed in the middle of a race."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

from tests.campaigns import (
    count_records,
    digests,
    records,
    run_darwin,
    run_joined,
    scored_items,
    start_joined,
    wait_for,
    write_campaign,
)
from workers.storage import open_store


def test_killed_within_a_race_the_child_is_the_same(tmp_path: Path, ray_address: str) -> None:
    """SIGKILL the driver after one candidate of a block: what is asked, decided and found is the same, no
    item is asked twice, and the winner was asked every item, by many fewer items in all."""
    settings = {
        "search": {"optimizer": "cma_es", "evaluations": 10, "population": 5},
        "racing": {"use": "race", "leaders": 1},
        "objective": "worst",
        "address": ray_address,
    }
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    expected = run_joined("run", str(write_campaign(tmp_path / "whole", **settings)))
    campaign = write_campaign(tmp_path / "killed", **settings)
    store = open_store(str(tmp_path / "killed" / "store" / "small"))
    count = partial(count_records, store)
    process = start_joined("run", str(campaign))
    # Three parents, and one candidate of the first block.
    wait_for(lambda: count("race") >= 1 and count("scored") >= 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    result = run_joined("run", str(campaign))
    assert result["recipe_id"] == expected["recipe_id"]
    assert digests(result["child"]) == digests(expected["child"])
    whole = records(open_store(expected["campaign"]))
    resumed = records(store)
    items = scored_items(resumed)
    assert len(items) == len(set(items))
    assert sorted(items) == sorted(scored_items(whole))
    for kind in ("race", "block", "raced"):
        own, other = ([{k: v for k, v in r.items() if k not in ("epoch", "time")} for r in ledger
                       if r["kind"] == kind] for ledger in (whole, resumed))  # fmt: skip
        assert own == other
    status = run_darwin("status", result["campaign"])
    assert status["evaluations"] == 10
    assert status["racing"]["items_of"] == 10 * 72
    assert status["racing"]["items_asked"] < 0.7 * 10 * 72
    winner = [i for i in items if i[:2] == (result["recipe_id"], "search")]
    assert len(winner) == 72
