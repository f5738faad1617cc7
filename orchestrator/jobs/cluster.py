"""A cluster's Darwin jobs, through Ray's Jobs API."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import ClusterError
from orchestrator.jobs.driver_config import DriverConfig
from workers.errors import BadInputError
from workers.storage.locations import absolute_location

CONNECT_SECONDS = 10.0
STOP_SECONDS = 60
"""So long Ray lets a driver save its state before it kills it."""

CAMPAIGN_KEY, NUMBER_KEY, CONFIGURATION_KEY = (
    "darwin_campaign", "darwin_submission", "darwin_configuration",
)  # fmt: skip
"""What a job's metadata say: the campaign's place, how many submissions of it there were with this one, and
a hash of its configuration."""

QUIET = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that tell of every package."""

HINTS = {
    "Version check returned": " Is this its dashboard's address (port 8265)?",
    "No available agent": (
        " The agent of the head's node is still starting, or another Ray on that machine has its port: "
        "then start the head with a free one (ray start --head --dashboard-agent-listen-port=...)"
    ),
}
"""What to do where Ray does not say it."""

NOT_FOUND = "status code 404"
ENDED = ("SUCCEEDED", "STOPPED", "FAILED")
INTERRUPTED, REJECTED = 130, 3
"""Exit codes of a driver that was stopped, and of one whose child was rejected."""


@dataclass(frozen=True)
class Job:
    """One submission of a campaign."""

    id: str
    campaign: str
    """Where the campaign is kept: `Store.uri`."""
    number: int
    configuration: str
    ray_status: str
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    message: str
    exit_code: int | None
    started: float | None
    """Seconds since 1970, by the head's clock, when it was submitted."""

    @property
    def is_active(self) -> bool:
        return self.ray_status not in ENDED

    @property
    def status(self) -> str:
        """pending, running, done, rejected, stopped (it can be resumed) or failed."""
        if self.ray_status == "FAILED":
            return {INTERRUPTED: "stopped", REJECTED: "rejected"}.get(self.exit_code or 0, "failed")
        return "done" if self.ray_status == "SUCCEEDED" else self.ray_status.lower()

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "job": self.id,
            "campaign": self.campaign,
            "status": self.status,
            "ray_status": self.ray_status,
            "exit_code": self.exit_code,
            "message": self.message,
            "started": self.started,
        }


class JobExistsError(Exception):
    """Another submission took the same id first."""


class Cluster:
    """The Jobs API at `http://HEAD:8265`."""

    def __init__(self, address: str) -> None:
        """Raises `ClusterError` if it does not answer, `BadInputError` for a wrong address or token."""
        self.address = address.rstrip("/")
        self._check_address()
        if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
            # Ray looks at the token only if it is told to; what wants none does not mind it.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise _needs_extra() from error
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
        with self.asking(), _address_as_given():
            self.client = JobSubmissionClient(self.address)

    def _check_address(self) -> None:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInputError(
                f"--address {self.address}: is no address of a cluster's Jobs API, such as "
                "http://HEAD:8265 (Ray's dashboard port, not the one that nodes join)"
            )
        if parts.password:
            raise BadInputError("--address: holds a password; give a token as RAY_AUTH_TOKEN_PATH")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            # Ray's client would wait for minutes for a host that does not answer.
            socket.create_connection((parts.hostname, port), CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ClusterError:
        return ClusterError(
            f"{self.address}: no cluster answers here ({error}): is its head up, is this its dashboard's "
            "address (ray start --head --dashboard-host=..., port 8265), and may this machine reach it?"
        )

    @contextmanager
    def asking(self) -> Iterator[None]:
        """What Ray and its HTTP client raise, said in terms of this cluster."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise BadInputError(
                f"{self.address}: this cluster wants a token, and {_token_problem()}: set "
                "RAY_AUTH_TOKEN_PATH to a file that holds the cluster's, or RAY_AUTH_TOKEN"
            ) from error
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise self._unreachable(error) from error
        except RuntimeError as error:
            if isinstance(error, ClusterError | BadInputError):
                raise
            if "ray[default]" in str(error):
                raise _needs_extra() from error
            said = _last_line(error)
            hint = next((hint for text, hint in HINTS.items() if text in said), "")
            raise ClusterError(f"{self.address}: {said}{hint}") from error

    def submit(
        self,
        job: Job,
        entrypoint: str,
        folder: Path,
        environment: dict[str, str],
        driver: DriverConfig,
    ) -> None:
        """Start a job. Raises `JobExistsError` if there is one of this id, `ClusterError` if Ray refuses."""
        with self.asking():
            try:
                self.client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job.id,
                    runtime_env={
                        "working_dir": str(folder),
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **environment},
                    },
                    metadata={
                        CAMPAIGN_KEY: job.campaign,
                        NUMBER_KEY: str(job.number),
                        CONFIGURATION_KEY: job.configuration,
                    },
                    entrypoint_num_cpus=driver.cpus,
                    entrypoint_memory=int(driver.memory * 1e9) if driver.memory else None,
                    entrypoint_resources=driver.resources or None,
                )
            except RuntimeError as error:
                if f"{job.id} already exists" in str(error):
                    raise JobExistsError(job.id) from error
                raise

    def jobs(self) -> list[Job]:
        """All Darwin jobs that the cluster knows, the oldest first."""
        with self.asking():
            found = [job for details in self.client.list_jobs() if (job := _read(details))]
        return sorted(found, key=lambda job: (job.started or 0, job.id))

    def jobs_of(self, campaign: str) -> list[Job]:
        """The submissions of one campaign, by its `Store.uri`, the oldest first."""
        return sorted(
            (job for job in self.jobs() if job.campaign == campaign), key=lambda job: job.number
        )

    def active_job(self, campaign: str) -> Job | None:
        """The submission of a campaign that waits or runs; None if there is none."""
        return next((job for job in reversed(self.jobs_of(campaign)) if job.is_active), None)

    def job(self, job_id: str) -> Job | None:
        """The job of this id, if there is one."""
        return next((job for job in self.jobs() if job.id == job_id), None)

    def find(self, name: str) -> Job:
        """The job of this id, or the newest of the campaign at STORE/NAME. Raises `BadInputError`."""
        job = self.job(name)
        if job is not None:
            return job
        campaign = absolute_location(name.rstrip("/"))
        own = self.jobs_of(campaign)
        if not own:
            raise BadInputError(
                f"{self.address}: has no Darwin job {name}, nor one of the campaign {campaign} "
                f"(darwin list --address {self.address} tells which it has)"
            )
        return own[-1]

    def read(self, job_id: str) -> Job:
        """A job as it stands."""
        with self.asking():
            try:
                found = _read(self.client.get_job_info(job_id))
            except RuntimeError as error:
                if NOT_FOUND in str(error):
                    raise BadInputError(f"{self.address}: has no job {job_id} any more") from error
                raise
        if found is None:
            raise BadInputError(f"{self.address}: {job_id} is no job of Darwin's")
        return found

    def stop(self, job_id: str) -> None:
        """Ask Ray to end a job: it interrupts the driver, and kills it after `STOP_SECONDS`."""
        with self.asking():
            self.client.stop_job(job_id)


def _read(details: Any) -> Job | None:
    """What Ray tells of a job; None if it is not one of Darwin's."""
    metadata = details.metadata or {}
    if details.submission_id is None or CAMPAIGN_KEY not in metadata:
        return None
    number = str(metadata.get(NUMBER_KEY, ""))
    return Job(
        id=details.submission_id,
        campaign=metadata[CAMPAIGN_KEY],
        number=int(number) if re.fullmatch(r"[0-9]{1,9}", number) else 0,
        configuration=metadata.get(CONFIGURATION_KEY, ""),
        ray_status=str(details.status),
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=details.start_time / 1000 if details.start_time else None,
    )


@contextmanager
def _address_as_given() -> Iterator[None]:
    """Ray's client would take the environment's address even where another one is given."""
    held = {
        name: os.environ.pop(name)
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
        if name in os.environ
    }
    try:
        yield
    finally:
        os.environ.update(held)


def _token_problem() -> str:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "none was given"
    if not os.environ.get("RAY_AUTH_TOKEN"):
        file = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
        try:
            held = Path(file).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError):
            held = ""
        if not held:
            return f"there is none in {file}"
    return "it refuses the one that was given"


def _needs_extra() -> BadInputError:
    return BadInputError(
        "submitting needs Ray's client of the Jobs API: pip install 'darwin-orchestrator[cluster]' "
        "(or ray[default])"
    )


def _last_line(error: Exception) -> str:
    """Ray sends whole tracebacks; their last line says what it is."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
