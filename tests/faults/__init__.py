"""Campaigns that are broken on purpose: `python -m tests.faults` prints the table of docs/faults.md.

A scenario is a function that takes a `Run`, one small campaign of the shipped family, drives it
to its end as a user would, and breaks what it is about on the way, at points that it draws from the run's
dice. It says `run.broke()` for each break that came to pass, and raises `LostError` if the campaign cannot
be brought to its end, `CannotError` if this machine cannot break things that way. What has become of the
campaign is judged against one that nothing has disturbed.
"""
