"""A request that the driver of a campaign stop, left in the store for its lease to find.

`stop.json` names one owner of the lease, by its epoch and its token: a later driver is none of its business.
"""

from __future__ import annotations

import _thread
import json
import signal
from typing import Any

from workers.storage import ObjectNotFoundError, Store

KEY = "stop.json"


def request_stop(store: Store, epoch: int, token: str) -> None:
    """Ask the owner of this epoch and token to stop, and to save its state as on an interrupt."""
    store.write(KEY, json.dumps({"epoch": epoch, "token": token}).encode())


def is_requested(store: Store, epoch: int, token: str) -> bool:
    """Whether this very owner is asked to stop. What is no request at all asks nobody."""
    try:
        found: Any = json.loads(store.read(KEY))
    except (ObjectNotFoundError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and (found.get("epoch"), found.get("token")) == (epoch, token)


def interrupt() -> None:
    """Interrupt this process's main thread as a SIGTERM would, or, where nobody minds that, a Ctrl-C.

    Nothing is sent: a signal would be lost where a shell or Ray has blocked it.
    """
    terminates = callable(signal.getsignal(signal.SIGTERM))
    _thread.interrupt_main(signal.SIGTERM if terminates else signal.SIGINT)
