"""This process's connection to Ray."""

from __future__ import annotations

import math
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from orchestrator.errors import PoolError
from orchestrator.workers_config import OWN_RESOURCES, WorkersConfig

ONLY_THIS_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's servers listen on every interface of a node, unless its address is the loopback. That it is
by default on desktop systems, where no cluster can be joined, and elsewhere by this switch of theirs.
`ray.init` has an argument for the address too, but replaces 127.0.0.1 in it."""


def start_ray(address: str | None, workers: WorkersConfig) -> None:
    """Connect to the cluster at `address`, or start Ray on this machine for this process alone.

    What is started here listens on 127.0.0.1 only.
    """
    # Before ray is imported: it reads these once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        # A token of our own, so that nothing is written to the user's home and nobody else gets in.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
    with _environment(ONLY_THIS_MACHINE if address is None else {}):
        _start(address, workers)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables too, for as long as Ray is imported and its processes start."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _start(address: str | None, workers: WorkersConfig) -> None:
    import ray

    asked: defaultdict[str, float] = defaultdict(float)
    for needs in workers.places:
        for name, size in needs.bundle.items():
            asked[name] += size * workers.gang
    # What of the machine's memory there is to reserve is Ray's to say.
    own = {name: math.ceil(size) for name, size in asked.items() if name not in OWN_RESOURCES}
    on_terminate = signal.getsignal(signal.SIGTERM)
    interrupted: list[int] = []
    # An interrupt in the middle of Ray's start leaves it in pieces: it is taken when Ray is up.
    on_interrupt = signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        else:
            ray.init(
                address="local",  # not a cluster that happens to run here
                num_cpus=max(1, math.ceil(asked["CPU"])),
                num_gpus=math.ceil(asked["GPU"]) or None,
                resources=own or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                object_store_memory=128 << 20,
            )
    except SystemExit as error:  # how Ray takes a SIGTERM while it starts
        raise KeyboardInterrupt from error
    except Exception as error:  # of that very class if a busy machine is too slow for Ray
        raise PoolError(f"Ray at {address or 'this machine'} does not start: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own would leave without saving
        signal.signal(signal.SIGINT, on_interrupt)
        if interrupted:
            raise KeyboardInterrupt


def cause_of(error: Exception) -> Exception:
    """The worker's own error behind what Ray raises, or what Ray says itself."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error
