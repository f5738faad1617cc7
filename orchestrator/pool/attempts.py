"""Which failures of a job count against it: its worker's own, and not those of a machine that went away.

The error of a call that was cut off says little: Ray learns of a lost node seconds after the calls on it have
failed. So such a failure is judged whenever the question comes up, by what is known of its nodes then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.pool.node_watch import NodeWatch

ATTEMPTS = 3
"""How often an evaluation may fail before it is recorded as failed."""

BAD_INPUT_ATTEMPTS = 2
"""The same for an error in the input: once more elsewhere, in case it is that machine's input alone."""

HUNG_SECONDS = 3600.0
"""A call that takes this much longer than it should is given up, and its worker killed. One batch of a
large model, or the statistics of its first merge, may take many minutes."""

UNCUT_CALLS = frozenset(
    {"examine", "publish_file", "hash_file"}
    | {"probe", "probe_span", "probe_ask", "probe_experts", "probe_layer"}
    | {"expert_inputs", "match_experts"}
    | {"calibrate_router", "compare_routing"}
)
"""Calls that are about whole models or files, and not cut to a size: they last as long as these are large."""

UNCUT_HUNG_SECONDS = 24 * 3600.0
"""The same for `UNCUT_CALLS`. A worker or node that dies is noticed at once; this is for one that hangs."""

BACK_OFF_SECONDS = 1.0

VERDICT_SECONDS = 60.0
"""For this long a call that was cut off for no known reason may turn out to have been on a lost node."""

AFTERMATH_SECONDS = 120.0
"""A node that is lost so long after a failure may have caused it: a machine that is shut down may kill its
processes one by one."""

LOST_NODES = 10
"""So many lost nodes, with nothing scored in between, have the work in common that they were lost with."""

# Ray tells these apart in words alone.
NODE_DIED = "its node has died"
ITS_OWN = ("worker process has died", "OutOfMemoryError")


@dataclass(frozen=True)
class Failure:
    """An attempt that failed."""

    error: str
    nodes: tuple[str, ...]
    """The ids of those that the worker was on, as far as they are known."""
    cut_off: bool
    """Whether the worker did not say anything itself."""
    when: float

    @classmethod
    def of(cls, cause: Exception, nodes: tuple[str, ...]) -> Failure:
        """The failure of a call on these nodes, just now."""
        import ray

        # What a worker raises arrives as it was raised: see `ray_session.cause_of`.
        cut_off = isinstance(cause, ray.exceptions.RayError | SilentError)
        return cls(f"{type(cause).__name__}: {cause}", nodes, cut_off, time.monotonic())


class SilentError(RuntimeError):
    """The worker gives no sign of life."""


def unexcused(failures: Iterable[Failure], watch: NodeWatch) -> list[Failure]:
    """Those of the failures that no lost node explains."""
    return [failure for failure in failures if not _is_excused(failure, watch)]


def counted(failures: Iterable[Failure], watch: NodeWatch) -> int:
    """How many attempts the failures are, of which none had anything scored. A lost node costs none, but so
    many that the work is what ends them."""
    now, failures = time.monotonic(), list(failures)
    own = unexcused(failures, watch)
    if len({failure.nodes for failure in failures if failure not in own}) >= LOST_NODES:
        return len(failures)
    return sum(
        not failure.cut_off
        or any(words in failure.error for words in ITS_OWN)
        or now - failure.when > VERDICT_SECONDS
        for failure in own
    )


def _is_excused(failure: Failure, watch: NodeWatch) -> bool:
    if not failure.cut_off:
        return False
    return NODE_DIED in failure.error or watch.loses(
        failure.nodes, failure.when + AFTERMATH_SECONDS
    )
