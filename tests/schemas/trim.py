"""Make `kubernetes.json`, which `tests/unit/test_deployment_files.py` reads, from the schemas of others.

    python -m tests.schemas.trim RAYCLUSTERS.yaml RAYJOBS.yaml KUBERNETES

The first two are KubeRay's definitions (v1.6.2, Apache-2.0): ray.io_rayclusters.yaml and ray.io_rayjobs.yaml
in helm-chart/kuberay-operator/crds of the repository ray-project/kuberay. The folder has Kubernetes' own
schemas (v1.36.0, Apache-2.0): kubernetes-json-schema/v1.36.0-local-strict of the Python package
kubernetes-validate 1.37.0. What `conf/cluster/kuberay.yaml` uses is kept of them, so that a key which is new
there, or misspelt, is refused until this has been run again: here, if the sources do not have it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

MANIFEST = Path(__file__).parents[2] / "conf" / "cluster" / "kuberay.yaml"
TARGET = Path(__file__).parent / "kubernetes.json"
NOTES = ("$id", "$schema", "description", "default")


def trim(
    schema: dict[str, Any], used: list[Any], where: str, shared: dict[str, Any]
) -> dict[str, Any]:
    """The part of a schema that says something of the values `used`; `shared` has what it refers to."""
    if "$ref" in schema:
        schema = shared[schema["$ref"].rpartition("/")[2]]
    kept = {
        key: value
        for key, value in schema.items()
        if key not in NOTES and not key.startswith("x-kubernetes-")
    }
    objects = [value for value in used if isinstance(value, dict)]
    if "properties" in schema:
        keys = sorted({key for value in objects for key in value})
        unknown = [key for key in keys if key not in schema["properties"]]
        if unknown:
            raise SystemExit(f"{where}: there is no {', '.join(unknown)}")
        kept["properties"] = {
            key: trim(
                schema["properties"][key],
                [value[key] for value in objects if key in value],
                f"{where}.{key}",
                shared,
            )
            for key in keys
        }
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        values = [value for thing in objects for value in thing.values()]
        kept["additionalProperties"] = trim(schema["additionalProperties"], values, where, shared)
    if "items" in schema:
        items = [item for value in used for item in value]
        kept["items"] = trim(schema["items"], items, where, shared)
    if schema.get("x-kubernetes-int-or-string"):
        kept["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return kept


def main() -> None:
    schemas: dict[str, Any] = {}
    for file in sys.argv[1:3]:
        definition = yaml.safe_load(Path(file).read_text())["spec"]
        version = next(v for v in definition["versions"] if v["name"] == "v1")
        schemas[definition["names"]["kind"]] = version["schema"]["openAPIV3Schema"]
    folder = Path(sys.argv[3])
    shared = json.loads((folder / "_definitions.json").read_text())
    shared = shared.get("$defs", shared.get("definitions"))
    own_metadata = {"$ref": "/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    for schema in schemas.values():
        schema["properties"]["metadata"] = own_metadata
    manifest = list(yaml.safe_load_all(MANIFEST.read_text()))
    kept = {}
    for kind in {thing["kind"] for thing in manifest}:
        if kind not in schemas:
            schemas[kind] = json.loads((folder / f"{kind.lower()}-v1.json").read_text())
        used = [thing for thing in manifest if thing["kind"] == kind]
        kept[kind] = trim(schemas[kind], used, kind, shared)
    TARGET.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
