"""This process's connection to Ray."""

from __future__ import annotations

import math
import os
import signal
from collections import defaultdict

from orchestrator.errors import PoolError
from orchestrator.workers_config import OWN_RESOURCES, WorkersConfig


def start_ray(address: str | None, workers: WorkersConfig) -> None:
    """Connect to the cluster at `address`, or start Ray on this machine for this process alone."""
    # Before ray is imported: it reads these once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        # A token of our own, so that nothing is written to the user's home and nobody else gets in.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
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
