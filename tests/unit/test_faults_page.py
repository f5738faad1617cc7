"""docs/faults.md has a line for each scenario of the fault suite."""

from __future__ import annotations

from pathlib import Path

from tests.faults.run import Verdict
from tests.faults.table import HEAD, SCENARIOS, row

PAGE = (Path(__file__).parents[2] / "docs" / "faults.md").read_text()


def test_every_scenario_has_its_line() -> None:
    _, _, table = PAGE.partition("<!-- table of faults -->\n")
    table, _, _ = table.partition("<!-- end of the table -->")
    assert table.startswith(HEAD)
    titles = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert titles[: len(SCENARIOS)] == [scenario.title for scenario in SCENARIOS.values()]


def test_what_is_not_sound_shows() -> None:
    sound = Verdict(breaks=2, lost=None, equal=True)
    assert sound.sound
    bad = [
        Verdict(breaks=1, lost="no end after 400 s"),
        Verdict(breaks=1, lost=None, equal=True, repeated=3),
        Verdict(breaks=1, lost=None, equal=True, missing=1),
        Verdict(breaks=1, lost=None, equal=True, overtaken=1),
        Verdict(breaks=1, lost=None, equal=False),
    ]
    assert not any(verdict.sound for verdict in bad)
    assert row("all of it", [sound, *bad]) == "| all of it | 6 | 7 | 1 | 3 | 4 of 6 |"
