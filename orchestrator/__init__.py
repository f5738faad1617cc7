"""What decides: runs where the driver runs, and does no tensor arithmetic.

`config` (what the user asked for) -> `parents` (what there is) -> `genome` (what can vary) -> `search` (ask and
tell) -> `pool` (the only place that schedules) -> `ledger` (the truth) -> `campaign` (the loop) ->
`publish` and `report` (the end), all behind `cli`.
"""
