"""The cluster of docker-compose.yml, on hosts of its own, runs a campaign, and loses its head meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns import count_records, wait_for, write_campaign
from tests.compose import ROOT, Compose
from tests.hosts import Hosts, why_not
from workers.storage.folder import FolderStore

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"{why_not()}")

PATIENCE_SECONDS = 300.0
"""On a machine that others use; Ray's nodes and processes that import torch start slowly there."""

STORE = "s3://darwin/runs"
CAMPAIGN = f"{STORE}/small"

AWAIT_SCORES = f"""
import sys, time
from orchestrator.ledger.ledger import read_records
from workers.storage import open_store
store, left, read = open_store(sys.argv[1]), int(sys.argv[2]), 0
deadline = time.monotonic() + {PATIENCE_SECONDS}
while left > 0:
    for record in read_records(store, read):
        read += 1
        left -= record["kind"] == "scored"
    assert time.monotonic() < deadline, f"{{read}} records, and {{left}} candidates are missing"
    time.sleep(0.2)
"""

SUMMARY = """
import collections, json, sys
from orchestrator.ledger.ledger import read_records
from workers.storage import open_store
store = open_store(sys.argv[1])
files = [info.key for info in store.list_objects("child-")]
print(json.dumps([collections.Counter(record["kind"] for record in read_records(store)), files]))
"""


def test_a_campaign_outlives_the_head_of_its_cluster(tmp_path: Path) -> None:
    compose = Compose(tmp_path, DARWIN_WORKER_CPUS="2")
    search = {"optimizer": "cma_es", "evaluations": 100, "population": 10}
    campaign = write_campaign(tmp_path, store=STORE, search=search)
    with Hosts(["store", "head", "worker1", "worker2", "client"]) as hosts:
        compose.prepare("darwin", hosts["client"])

        def darwin(*arguments: str) -> str:
            return compose.run(hosts["client"], "darwin", *arguments)

        def python(code: str, *arguments: str) -> str:
            environment = compose.environment("darwin")
            command = [sys.executable, "-c", code, *arguments]
            return hosts["client"].run(*command, environment=environment, seconds=PATIENCE_SECONDS)

        compose.up(hosts, store="store", head="head")
        compose.up(hosts, worker1="worker", worker2="worker")
        job = json.loads(darwin("submit", str(campaign), "--json"))
        python(AWAIT_SCORES, CAMPAIGN, "6")
        hosts["head"].lose_power()
        python(AWAIT_SCORES, CAMPAIGN, "12")
        hosts.power_on("head")
        compose.up(hosts, head="head")
        ended = json.loads(darwin("logs", CAMPAIGN, "--follow", "--json"))
        kinds, files = json.loads(python(SUMMARY, CAMPAIGN))
    assert ended["job"] == job["job"]
    assert ended["status"] == "done"
    assert kinds["epoch"] == 1, "one driver did it all, on a worker's node"
    assert kinds["finished"] == 1
    assert any(name.endswith("/model.safetensors") for name in files)


SRUN = """#!{python}
import json, os, signal, subprocess, sys
node = next(word for word in sys.argv if word.startswith("--nodelist=")).partition("=")[2]
first = next(n for n, word in enumerate(sys.argv) if n and not word.startswith("--"))
enter = json.load(open({hosts!r}))[node]
task = subprocess.Popen([*enter, *sys.argv[first:]])
def forward(number, frame):
    for process in open(f"/proc/{{task.pid}}/task/{{task.pid}}/children").read().split():
        os.kill(int(process), number)
signal.signal(signal.SIGTERM, forward)
sys.exit(task.wait())
"""
"""In place of Slurm's own: the command runs on the host that is to be its node, and gets srun's signals."""

SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") tr ',' '\\n' <<END
$3
END
;;
*) echo "$@" >> {asked} ;;
esac
"""


def test_a_slurm_job_whose_time_is_over_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    nodes = ["node1", "node2"]
    search = {"optimizer": "cma_es", "evaluations": 16, "population": 4}
    campaign = write_campaign(tmp_path, search=search)
    asked = tmp_path / "asked"
    hosts_file = tmp_path / "hosts.json"
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "srun": SRUN.format(python=sys.executable, hosts=str(hosts_file)),
        "scontrol": SCONTROL.format(asked=asked),
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": ",".join(nodes),
        "SLURM_CPUS_PER_TASK": "1",
        "DARWIN_SLURM_FOLDER": str(tmp_path / "slurm"),
        "RAY_TMPDIR": "/tmp/ray",
    }
    store = FolderStore(tmp_path / "store" / "small")

    said = tmp_path / "said"

    def start() -> subprocess.Popen[str]:
        script = str(ROOT / "conf" / "cluster" / "slurm.sh")
        with said.open("w") as output:  # no pipe: Ray's nodes go on writing until Slurm ends them
            return subprocess.Popen(
                [script, str(campaign)],
                env=os.environ | environment,
                stdout=output,
                stderr=output,
                text=True,
            )

    with Hosts(nodes) as hosts:
        hosts_file.write_text(json.dumps({node: hosts[node].command() for node in nodes}))
        job = start()
        wait_for(lambda: count_records(store, "scored") >= 2, job, PATIENCE_SECONDS)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE_SECONDS) == 130, said.read_text()
        assert asked.read_text() == "requeue 77\n"
        assert not list((tmp_path / "slurm").iterdir()), "the token is gone"
        assert count_records(store, "scored") < 16
        for node in nodes:  # what Slurm would end
            hosts[node].lose_power()
            hosts.power_on(node)
        hosts_file.write_text(json.dumps({node: hosts[node].command() for node in nodes}))
        job = start()
        assert job.wait(PATIENCE_SECONDS) == 0, said.read_text()
    assert count_records(store, "finished") == 1
    assert count_records(store, "epoch") == 2
    assert asked.read_text() == "requeue 77\n"
