"""Submitting: one job for a campaign, whoever submits it, and a cluster's errors said in its own terms."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from orchestrator.config import config_to_dict, load_config
from orchestrator.errors import ClusterError
from orchestrator.jobs.cluster import Cluster
from orchestrator.jobs.logs import ended_line, exit_code_of, follow_logs
from orchestrator.jobs.submitting import ENTRYPOINT, recorded_campaign, submit_campaign
from orchestrator.ledger.ledger import Ledger
from tests.campaigns import write_campaign
from tests.jobs_api import JobsApi
from workers.errors import BadInputError
from workers.storage import open_store


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobsApi]:
    # An address of the environment is for whoever gives none.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with JobsApi() as server:
        yield server


def submit(api: JobsApi, tmp_path: Path, *overrides: str, **options: Any) -> Any:
    config = load_config(str(write_campaign(tmp_path)), list(overrides))
    options = {"installed": True, "unchecked": True} | options
    return submit_campaign(config, Cluster(api.address), lambda text: None, **options)


def metadata_of(api: JobsApi) -> dict[str, str]:
    found: dict[str, str] = api.submitted[-1]["metadata"]
    return found


def test_a_job_says_what_it_needs_and_nothing_else(api: JobsApi, tmp_path: Path) -> None:
    driver = ("driver.memory=2", "driver.cpus=0.5", "driver.resources={gpu_worker: 0.1}")
    done = submit(api, tmp_path, *driver, assignments=["HF_HUB_OFFLINE=1"])
    (request,) = api.submitted
    assert (done.job.id, done.attached) == (request["submission_id"], False)
    assert request["entrypoint"] == ENTRYPOINT
    assert request["entrypoint_num_cpus"] == 0.5
    assert request["entrypoint_memory"] == 2_000_000_000
    assert request["entrypoint_resources"] == {"gpu_worker": 0.1}
    assert set(request["runtime_env"]) - {"_ray_release", "_ray_commit"} == {
        "working_dir",
        "env_vars",
    }
    assert request["runtime_env"]["env_vars"] == {
        "HF_HUB_OFFLINE": "1", "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }  # fmt: skip
    assert request["metadata"]["darwin_campaign"] == str(tmp_path / "store" / "small")


def test_a_campaign_that_runs_is_attached_to(api: JobsApi, tmp_path: Path) -> None:
    first = submit(api, tmp_path)
    again = submit(api, tmp_path)
    assert (again.attached, again.same_configuration) == (True, True)
    assert again.job.id == first.job.id
    other = submit(api, tmp_path, "workers.count=3")
    assert (other.attached, other.same_configuration) == (True, False)
    assert len(api.submitted) == 1
    api.jobs[first.job.id]["status"] = "FAILED"
    second = submit(api, tmp_path)
    assert not second.attached and second.job.id != first.job.id
    # Another campaign of that name, elsewhere, is not this one.
    elsewhere = submit(api, tmp_path, f"store={tmp_path}/elsewhere")
    assert not elsewhere.attached


@pytest.mark.parametrize("became", ["RUNNING", "SUCCEEDED"])
def test_who_is_late_attaches_or_goes_on(api: JobsApi, tmp_path: Path, became: str) -> None:
    """Another one submits between the look at what runs and our own request."""
    first = submit(api, tmp_path)
    metadata = metadata_of(api)
    api.jobs.clear()

    def be_quicker() -> None:
        if not api.jobs:
            api.add(first.job.id, became, metadata=metadata)

    api.before_submit = be_quicker
    done = submit(api, tmp_path)
    assert done.attached == (became == "RUNNING")
    assert (done.job.id == first.job.id) == done.attached


def test_what_cannot_run_is_not_submitted(api: JobsApi, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no_such_method"):
        submit(api, tmp_path, "genome.method=no_such_method", unchecked=False)
    assert not api.submitted


def test_what_is_not_here_is_left_to_the_driver(api: JobsApi, tmp_path: Path) -> None:
    said: list[str] = []
    overrides = ["parents.0.path=/on/the/nodes/alone", "genome.method=no_such_method"]
    config = load_config(str(write_campaign(tmp_path)), overrides)
    submit_campaign(config, Cluster(api.address), said.append, installed=True)
    assert any("not checked here, as /on/the/nodes/alone is not on this machine" in t for t in said)
    assert len(api.submitted) == 1


def test_a_log_is_handed_on_once_over_broken_connections(api: JobsApi, tmp_path: Path) -> None:
    job = submit(api, tmp_path).job
    lines = [f"line {number}\n" for number in range(6)]

    def sending(count: int, ends: bool) -> Any:
        async def send(answer: web.WebSocketResponse) -> None:
            # In other pieces each time.
            text = "".join(lines[:count])
            for start in range(0, len(text), 5 + count):
                await answer.send_str(text[start : start + 5 + count])
            if ends:
                api.jobs[job.id] |= {"status": "FAILED", "driver_exit_code": 3}

        return send

    api.connections = [sending(2, False), sending(1, False), sending(4, False), sending(6, True)]
    said: list[str] = []
    ended = follow_logs(Cluster(api.address), job, said.append)
    assert "".join(said) == "".join(lines)
    assert (ended.status, exit_code_of(ended)) == ("rejected", 3)
    assert ended_line(ended) == f"{job.id} rejected (exit code 3)"


@pytest.mark.parametrize(
    ("ray_status", "exit_code", "status", "ends_with"),
    [
        ("SUCCEEDED", 0, "done", 0),
        ("FAILED", 3, "rejected", 3),
        ("FAILED", 130, "stopped", 130),
        ("STOPPED", None, "stopped", 130),
        ("FAILED", 2, "failed", 2),
        ("FAILED", None, "failed", 1),  # its node was lost
        ("PENDING", None, "pending", 1),
    ],
)
def test_a_job_ends_as_its_driver_did(
    api: JobsApi, ray_status: str, exit_code: int | None, status: str, ends_with: int
) -> None:
    api.add("a", ray_status, driver_exit_code=exit_code, metadata={"darwin_campaign": "/runs/a"})
    job = Cluster(api.address).find("a")
    assert (job.status, exit_code_of(job)) == (status, ends_with)


def test_jobs_of_others_are_none_of_ours(api: JobsApi) -> None:
    api.add("raysubmit_1", "RUNNING", metadata={})
    api.add("raysubmit_2", "RUNNING")
    api.add("b", "RUNNING", metadata={"darwin_campaign": "/runs/b", "darwin_submission": "x" * 99})
    cluster = Cluster(api.address)
    assert [job.id for job in cluster.jobs()] == ["b"]
    with pytest.raises(
        BadInputError, match=r"has no Darwin job raysubmit_1, nor one of the campaign"
    ):
        cluster.find("raysubmit_1")
    assert cluster.find("/runs/b/").id == "b"


# -- addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["auto", "10.0.0.1:6379", "ray://head:10001", "http://", "ftp://head"]
)
def test_what_is_no_address_is_told(address: str) -> None:
    with pytest.raises(
        BadInputError, match=r"no address of a cluster's Jobs API.*http://HEAD:8265"
    ):
        Cluster(address)


def test_a_cluster_that_does_not_answer_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"{address}: no cluster answers here"):
            Cluster(address)


# -- resuming --------------------------------------------------------------------------------


def test_a_recorded_campaign_is_gone_on_with_where_it_lies(tmp_path: Path) -> None:
    config = load_config(str(write_campaign(tmp_path)))
    store = open_store(str(tmp_path / "moved" / "other"))
    ledger = Ledger(store)
    ledger.open_epoch(1)
    with pytest.raises(BadInputError, match="stopped before it began"):
        recorded_campaign(store.uri, [])
    ledger.append("campaign", identity={}, config=config_to_dict(config))
    found = recorded_campaign(store.uri, ["workers.count=7"])
    assert (found.store, found.name, found.workers.count) == (str(tmp_path / "moved"), "other", 7)
    assert found.parents == config.parents and found.search == config.search
    with pytest.raises(BadInputError, match=r"workers\.count"):
        recorded_campaign(store.uri, ["workers.count=0"])
    with pytest.raises(BadInputError, match="there is no campaign here"):
        recorded_campaign(str(tmp_path / "moved" / "none"), [])
