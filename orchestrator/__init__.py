"""What decides: runs where the driver runs, and does no tensor arithmetic.

`config` (what the user asked for) -> `inputs` (what there is) -> `genome` (what can vary) -> `search`
(ask and tell) -> `pool` (the only place that schedules) -> `ledger` (the truth) and `state` (what it
says) -> `campaign` (the loop) -> `judgement`, `lineage`, `card` and `report` (the end), behind `cli`.
"""
