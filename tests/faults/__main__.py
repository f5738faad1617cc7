"""`python -m tests.faults [--runs N] [--only NAME]... [--seed S]`: break things, print the table."""

from __future__ import annotations

import argparse
import sys

from tests.faults.table import SCENARIOS, play_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, help="campaigns for each scenario")
    parser.add_argument(
        "--only", action="append", choices=list(SCENARIOS), help="this scenario alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(not play_all(options.only or list(SCENARIOS), options.runs, options.seed))


if __name__ == "__main__":
    main()
