"""Python's clock of day, wrong by `WRONG_BY_SECONDS`: for processes that have this folder in `PYTHONPATH`.

What libfaketime does to all of a process, but that stops Python's own `sleep` and Ray's waiting.
"""

import os
import time

_seconds = int(os.environ.get("WRONG_BY_SECONDS", "0"))
_time, _time_ns = time.time, time.time_ns


def _wrong_time() -> float:
    return _time() + _seconds


def _wrong_time_ns() -> int:
    return _time_ns() + _seconds * 10**9


time.time, time.time_ns = _wrong_time, _wrong_time_ns
