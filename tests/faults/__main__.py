"""`python -m tests.faults [--runs N] [--only NAME]... [--seed S]`: break things, print the table."""

from __future__ import annotations

import argparse
import sys

from tests.faults.ground import run_to_expect
from tests.faults.table import SCENARIOS, play_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, help="campaigns for each scenario")
    parser.add_argument(
        "--only", action="append", choices=list(SCENARIOS), help="this scenario alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--undisturbed", help="the store of that campaign, if `tests.campaigns` has run it before"
    )
    options = parser.parse_args()
    expected = run_to_expect(options.undisturbed) if options.undisturbed else None
    names = options.only or list(SCENARIOS)
    sys.exit(not play_all(names, options.runs, options.seed, expected))


if __name__ == "__main__":
    main()
