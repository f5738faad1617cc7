"""Whole campaigns as a user runs them: resumed after kills, with dying workers, on S3."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

from orchestrator.config import SHIPPED
from orchestrator.ledger.ledger import Record
from tests.campaigns import (
    count_records,
    digests,
    ray_processes,
    records,
    run_darwin,
    run_joined,
    scored_items,
    start_darwin,
    start_joined,
    wait_for,
    write_campaign,
)
from tests.s3_policy import Policy, guarded
from tests.secrecy import files_under, listening, planted_secrets
from workers.checkpoints import open_checkpoint
from workers.storage import StorageError, open_store


def test_the_result_says_what_was_done(undisturbed: dict) -> None:
    assert undisturbed["status"] == "done"
    assert undisturbed["evaluations"] == 14
    assert set(undisturbed["holdout"]) == {"child", "reverse", "sort", "shift"}
    for scores in undisturbed["holdout"].values():
        for score in scores.values():
            assert score["n"] == 48
            assert score["low"] <= score["score"] <= score["high"]
    assert {(c["parent"], c["task"]) for c in undisturbed["comparisons"]} == {
        (parent, task)
        for parent in ("reverse", "sort", "shift")
        for task in ("all", "reverse", "sort", "shift")
    }
    store = open_store(undisturbed["campaign"])
    assert store.read("report.html")
    assert f"child-{undisturbed['recipe_id'][:12]}" in undisturbed["child"]


def test_the_child_is_an_ordinary_checkpoint(undisturbed: dict) -> None:
    """It loads with transformers, and scores by hand what the campaign says it scores."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        undisturbed["child"], dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        undisturbed["child"], padding_side="left"
    )
    names = {info.key for info in open_store(undisturbed["child"]).list_objects()}
    assert {"config.json", "generation_config.json", "README.md", "lineage.json"} <= names
    assert "attribution.json" in names
    ledger = records(open_store(undisturbed["campaign"]))
    held_out = {
        item["id"]: item
        for record in ledger
        if record["kind"] == "scored" and record["split"] == "holdout"
        and record["recipe"] == undisturbed["recipe_id"]
        for item in record["items"].get("sort", [])
    }  # fmt: skip
    items = _items("sort.holdout.jsonl")
    inputs = tokenizer([items[i]["prompt"] for i in held_out], padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            max_new_tokens=10, do_sample=False,
        )  # fmt: skip
    texts = tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = {i: text.strip() == items[i]["answer"] for i, text in zip(held_out, texts, strict=True)}
    assert {i: item["score"] == 1.0 for i, item in held_out.items()} == right


def test_every_decision_is_in_the_ledger(undisturbed: dict) -> None:
    ledger = records(open_store(undisturbed["campaign"]))
    kinds = [record["kind"] for record in ledger]
    assert kinds[:3] == ["epoch", "campaign", "engine"]
    assert kinds[-3:] == ["child", "publishing", "finished"]
    assert kinds.index("searched") < kinds.index("selected") < kinds.index("child")
    asked = [c["recipe"] for r in ledger if r["kind"] == "asked" for c in r["candidates"]]
    search = {recipe for recipe, split, _, _ in scored_items(ledger) if split == "search"}
    parents = search - set(asked)
    assert len(parents) == 3
    assert len(search & set(asked)) == 14
    items = scored_items(ledger)
    assert len(items) == len(set(items)) == (14 + 3) * 3 * 24 + 4 * 3 * 48


def test_a_finished_campaign_is_not_run_again(undisturbed: dict) -> None:
    before = records(open_store(undisturbed["campaign"]))
    folder = Path(undisturbed["campaign"]).parent.parent
    again = run_darwin("run", str(folder / "campaign.yaml"))
    assert again == undisturbed
    after = records(open_store(undisturbed["campaign"]))
    assert [r for r in after if r["kind"] != "epoch"] == [r for r in before if r["kind"] != "epoch"]
    status = run_darwin("status", undisturbed["campaign"])
    assert (status["status"], status["evaluations"], status["child"]) == (
        "done", 14, undisturbed["child"],
    )  # fmt: skip


ENDLESS = {"optimizer": "cma_es", "evaluations": 5000, "population": 4}
"""A search that is not over before something else was started, or a signal sent, however slow that is."""


def test_interrupted_and_terminated_drivers_save_their_state(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path, search=ENDLESS)
    store = open_store(str(tmp_path / "store" / "small"))
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        before = count_records(store, "scored")
        process = start_darwin("run", str(campaign))
        wait_for(lambda before=before: count_records(store, "scored") >= before + 4, process)
        process.send_signal(signal_number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert run_darwin("status", store.uri)["status"] == "unfinished"
    items = scored_items(records(store))
    assert len(items) == len(set(items)), "what the first driver had scored was scored again"


def test_two_drivers_and_changed_configurations_are_refused(
    tmp_path: Path, ray_address: str
) -> None:
    campaign = write_campaign(tmp_path, search=ENDLESS, address=ray_address)
    store = open_store(str(tmp_path / "store" / "small"))
    process = start_joined("run", str(campaign))
    wait_for(lambda: any(r["kind"] == "asked" for r in records(store)), process)
    refused = run_joined("run", str(campaign), expect=2)
    assert f"process {process.pid}" in refused["error"]
    process.send_signal(signal.SIGINT)
    process.communicate()
    changed = run_joined("run", str(campaign), "seed=1", "search.step=0.5", expect=2)
    assert "search.step, seed" in changed["error"]


def test_a_larger_budget_continues_the_search(
    undisturbed: dict, tmp_path: Path, ray_address: str
) -> None:
    """14 evaluations and then 18 are the same search as 18 at once; 14 ends within a generation."""
    small, large = tmp_path / "small", tmp_path / "large"
    large.mkdir()
    shutil.copytree(undisturbed["campaign"], small / "store" / "small")
    campaign = write_campaign(small, address=ray_address)
    budget = {"optimizer": "cma_es", "evaluations": 18, "population": 4}
    extended = run_joined("run", str(campaign), "search.evaluations=18")
    at_once = run_joined("run", str(write_campaign(large, search=budget, address=ray_address)))
    assert extended["evaluations"] == at_once["evaluations"] == 18
    assert extended["recipe_id"] == at_once["recipe_id"]
    assert digests(extended["child"]) == digests(at_once["child"])
    smaller = run_darwin("run", str(campaign), "search.evaluations=10", expect=2)
    assert "search.evaluations" in smaller["error"]


def test_on_a_real_s3_server(
    undisturbed: dict, s3_location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Store, parents, tasks and genome space in a bucket, with no more rights than the shipped policy gives
    and secrets in the environment: the same child, byte for byte, nothing open to the network, and no
    secret in anything that was written."""
    parents = []
    for name in ("reverse", "sort", "shift"):
        source, target = (
            open_store(f"shipped:strings/{name}"),
            open_store(f"{s3_location}/models/{name}"),
        )
        for info in source.list_objects():
            target.write(info.key, source.read(info.key))
        parents.append({"name": name, "path": target.uri})
    definitions = open_store(f"{s3_location}/models/conf")
    for kind, name in [
        ("genome", "components"),
        ("task", "reverse"),
        ("task", "sort"),
        ("task", "shift"),
    ]:
        definitions.write(f"{name}.yaml", (SHIPPED / kind / f"{name}.yaml").read_bytes())
    tasks = [
        {"name": f"{definitions.uri}/{name}.yaml", "search_items": 24, "holdout_items": 48}
        for name in ("reverse", "sort", "shift")
    ]
    campaign = write_campaign(
        tmp_path,
        store=f"{s3_location}/campaigns",
        parents=parents,
        tasks=tasks,
        genome={"space": f"{definitions.uri}/components.yaml", "method": "dare_ties"},
    )
    bucket = s3_location.removeprefix("s3://")
    policy = Policy.shipped(MODELS_BUCKET=bucket, MODELS_PREFIX="models",
                            STORE_BUCKET=bucket, STORE_PREFIX="campaigns")  # fmt: skip
    store = open_store(f"{s3_location}/campaigns/small")
    with (
        guarded(os.environ["AWS_ENDPOINT_URL"], policy) as (endpoint, gate),
        tempfile.TemporaryDirectory(prefix="ray-") as logs,  # sockets lie in it: short
    ):
        secrets = planted_secrets()
        environment = os.environ | secrets | {"AWS_ENDPOINT_URL": endpoint, "RAY_TMPDIR": logs}
        process = start_darwin("run", str(campaign), "--json", environment=environment)
        wait_for(lambda: count_records(store, "scored") >= 1, process)
        addresses = listening(process.pid)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        result = json.loads(out)
        written = {info.key: store.read(info.key) for info in store.list_objects()}
        written |= files_under(Path(logs)) | {"out": out.encode(), "err": err.encode()}
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        guarded_store = open_store(store.uri)
        # What a merge that was interrupted asks before it goes on.
        upload = guarded_store.begin_parts("upload", 1)
        assert guarded_store.parts_exist("upload", upload)
        guarded_store.abandon_parts("upload", upload)
        assert gate.refused == []
        for sid, action in policy.rights():
            fewer = policy.without(sid, action)
            assert not all(map(fewer.allows, gate.asked)), f"{action} of {sid} is not needed"
        for forbidden in ("models/reverse", "campaigns-of-others"):
            with pytest.raises(StorageError, match="access was refused"):
                open_store(f"{s3_location}/{forbidden}").write("object", b"bytes")
    assert {kind for kind, _ in addresses} >= {"gcs_server", "raylet", "python"}
    assert {address for _, address in addresses if not address.is_loopback} == set()
    assert any("gcs_server" in name for name in written)
    assert any(name.startswith("ledger/") for name in written)
    assert [(s, n) for s, v in secrets.items() for n, c in written.items() if v.encode() in c] == []
    monkeypatch.undo()
    assert digests(result["child"]) == digests(undisturbed["child"])
    assert open_checkpoint(result["child"]).tensors
    assert run_darwin("status", result["campaign"])["status"] == "done"


def test_the_whole_demo_on_a_real_s3_server(s3_location: str) -> None:
    """What `make demo` runs, and what it promises of the child."""
    result = run_darwin("run", "demo", f"store={s3_location}/demo")
    assert result["evaluations"] == 200
    assert min(score["score"] for score in result["holdout"]["child"].values()) >= 0.88
    assert result["beaten"] == ["reverse", "sort", "shift"]
    names = {info.key for info in open_store(result["child"]).list_objects()}
    assert {"README.md", "config.json", "lineage.json", "model.safetensors"} <= names
    assert b"</html>" in open_store(result["campaign"]).read("report.html")


def test_a_configuration_that_did_not_work_may_be_mended(tmp_path: Path, ray_address: str) -> None:
    """As long as nothing was scored, the campaign's name is not taken."""
    campaign = write_campaign(tmp_path, address=ray_address)
    refused = run_joined("run", str(campaign), "engine.device=cuda", expect=2)
    assert "engine.device" in refused["error"]
    assert run_joined("run", str(campaign), "search.evaluations=4")["evaluations"] == 4


def test_a_moved_campaign_is_where_it_is(undisturbed: dict, tmp_path: Path) -> None:
    store = Path(undisturbed["campaign"])
    shutil.copytree(store, tmp_path / "store" / "small")
    moved = run_darwin("run", str(write_campaign(tmp_path)))
    assert moved["child"] == f"{tmp_path}/store/small/child-{undisturbed['recipe_id'][:12]}"
    assert moved["holdout"] == undisturbed["holdout"]


def test_the_scan_is_made_by_the_workers_and_recorded_once(
    tmp_path: Path, ray_address: str
) -> None:
    """Killed when the prescription is recorded: the next driver goes by it, without the kept scan."""
    parents = [{"name": name, "path": f"shipped:strings/{name}"} for name in ("reverse", "sort")]
    campaign = write_campaign(
        tmp_path,
        parents=parents,
        genome={"space": "darwin14", "method": "slerp", "start": "pattern"},
        search={"optimizer": "cma_es", "evaluations": 5, "population": 4},
        address=ray_address,
    )
    store = open_store(str(tmp_path / "store" / "small"))

    def prescriptions() -> list[Record]:
        return [record for record in records(store) if record["kind"] == "prescription"]

    process = start_joined("run", str(campaign))
    wait_for(lambda: bool(prescriptions()), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(tmp_path / "store" / "scans")
    result = run_joined("run", str(campaign))
    assert result["evaluations"] == 5
    assert len(prescriptions()) == 1
    assert not (tmp_path / "store" / "scans").exists()
    advised = prescriptions()[0]["prescription"]["shares"]
    assert len(advised) == len(open_checkpoint("shipped:strings/reverse").tensors)
    assert prescriptions()[0]["reserved"]["cpu"] > 0  # the scan's, though its driver was killed


def test_a_search_that_begins_at_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    """All weights are 0 where it would begin: there is no such mean."""
    space = tmp_path / "space.yaml"
    space.write_text(
        "groups: {all: [embedding, attention, mlp, norm]}\n"
        "genes: {linear: {weight: {per: [parent], low: -1.0, high: 1.0, start: 0.0}}}\n"
    )
    parents = [{"name": name, "path": f"shipped:strings/{name}"} for name in ("sort", "shift")]
    campaign = write_campaign(
        tmp_path,
        parents=parents,
        base=None,
        genome={"space": str(space), "method": "linear"},
        search={"optimizer": "random", "evaluations": 4, "population": 4},
    )
    refused = run_darwin("run", str(campaign), expect=2)
    assert "sum to 0" in refused["error"]


def test_on_a_running_cluster(undisturbed: dict, tmp_path: Path) -> None:
    """With `address`, workers run in a cluster that is up already, and leave it as it was."""
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    port = free_port()
    head = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
            "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2",
            "--include-dashboard=false", "--disable-usage-stats",
        ],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for(lambda: is_listening(port), head)
        campaign = write_campaign(tmp_path, address=f"127.0.0.1:{port}")
        result = run_darwin("run", str(campaign), environment=environment)
        assert digests(result["child"]) == digests(undisturbed["child"])
        assert head.poll() is None
        wait_for(lambda: not engine_processes(head.pid), head)
    finally:
        head.terminate()
        head.communicate(timeout=60)


def engine_processes(ancestor: int) -> list[int]:
    """Pids of the Ray workers below a process that hold an engine."""
    return ray_processes("EvaluationWorker", ancestor)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def is_listening(port: int) -> bool:
    with socket.socket() as opened:
        return opened.connect_ex(("127.0.0.1", port)) == 0


def _items(file: str) -> dict[str, Record]:

    lines = open_store("shipped:strings/items").read(file).decode().splitlines()
    return {item["id"]: item for item in map(json.loads, lines)}
