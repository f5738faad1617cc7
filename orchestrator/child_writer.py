"""Write a child: part by part, by any number of workers, going on at the missing parts after any crash.

What is done is recorded beside the child, under `merge-in-progress/`: the manifest names the recipe and
the open uploads, and each further record some parts that are written. The records go when the child is
published. A part that was written but not recorded is written again, with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.descent.lineage import (
    ALIGNMENT_FILE,
    ATTRIBUTION_FILE,
    LINEAGE_FILE,
    package_version,
)
from orchestrator.descent.shares import recorded_parameters
from orchestrator.merge_progress import (
    MANIFEST,
    PROGRESS,
    WRITTEN,
    read_manifest,
    read_progress,
)
from orchestrator.part_groups import group_parts, part_owners
from orchestrator.pool.calls import Calls
from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor, publish_companions
from workers.errors import BadInputError
from workers.merging import Recipe
from workers.merging.parts import Part, cut_parts
from workers.merging.plan import Assignment, Plan, form_of
from workers.storage import (
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    Store,
)
from workers.storage.documents import read_document

RECORD_BYTES = 256 << 20
"""So much is written between two records, or a sixteenth of a small child: what a crash may cost."""


@dataclass
class ChildReport:
    """What a written child consists of."""

    files: dict[str, str]
    """File -> SHA-256, read back from the store."""
    tensors: list[dict[str, Any]]
    """Of each logical tensor: name, component, layer, elements, method, parameters; how many elements
    differ from each parent that has it (`changed`), and of a sample how many by more than rounding
    (`moved`: differing, looked at); how many are `not_finite`, and how many of these are `broken`: not the
    father's own. A blend that changed nothing has `reach` (see `workers.merging.child.PartReport`); of one
    that was copied, elements with other bits than in its source are `miscopied`."""

    def to_dict(self) -> dict[str, Any]:
        return {"files": self.files, "tensors": self.tensors}


@dataclass
class ChildWriter:
    """Writes the child of one recipe into `target`. Everything is decided from headers alone."""

    recipe: Recipe
    father: Checkpoint
    plan: Plan
    target: Store
    parts: tuple[Part, ...]
    assigned: dict[str, Any]
    _written: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    _files: dict[str, str] = field(default_factory=dict)
    _uploads: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def create(
        recipe: Recipe,
        parents: dict[str, Checkpoint],
        base: Checkpoint | None,
        target: Store,
    ) -> ChildWriter:
        """Plan the child. Raises `BadInputError` for a recipe that cannot work."""
        plan = Plan(
            {name: ArchitectureMap.of(parent) for name, parent in parents.items()},
            ArchitectureMap.of(base) if base else None,
            form_of(recipe),
        )
        assigned = plan.assign(recipe)
        father = next(iter(parents.values()))
        return ChildWriter(recipe, father, plan, target, cut_parts(plan, assigned), assigned)

    @property
    def total_bytes(self) -> int:
        return sum(part.stop - part.start for part in self.parts)

    def write(self, calls: Calls, notify: Callable[[int], None] = lambda done: None) -> ChildReport:
        """`merge`, check that all is finite, `finish`. `publish` then makes the folder a checkpoint.

        Raises `BadInputError` if a tensor of the child holds a NaN or an infinity, and is not the father's
        own.
        """
        report = self.merge(calls, notify)
        check_finite(report)
        return self.finish(calls, report)

    def merge(self, calls: Calls, notify: Callable[[int], None] = lambda done: None) -> ChildReport:
        """Write the parts that are missing; what the child is like. No file of it appears yet.

        `notify` is told of bytes written. If this very child is there already, whole, it is read and its
        own report given.
        """
        earlier = self._written_before(calls)
        if earlier is not None:
            return earlier
        self._open()
        sizes = {part.key: part.stop - part.start for part in self.parts}
        notify(sum(sizes[key] for key in self._written))
        pending: list[dict[str, Any]] = []
        size = 0
        missing = [
            part
            for part in self.parts
            if part.key not in self._written and part.file not in self._files
        ]
        owners = part_owners(self.parts, self.plan.child.tensors, calls.workers)
        groups = group_parts(missing, owners, calls.group_bytes(self.total_bytes))
        recipe = self.recipe.to_dict()
        given = [(recipe, self.target.uri, self._uploads, group.keys) for group in groups]
        preferred = [group.owner for group in groups]
        for _, reports in calls.each("write_parts", given, preferred):
            for written in [dict(vars(report)) for report in reports]:
                key = written["file"], written["number"]
                written["upload"] = self._uploads[written["file"]]
                self._written[key] = written
                pending.append(written)
                size += sizes[key]
                notify(sizes[key])
            if size >= min(RECORD_BYTES, self.total_bytes // 16):
                self._record({"parts": pending})
                pending, size = [], 0
        if pending:
            self._record({"parts": pending})
        return self._report()

    def finish(self, calls: Calls, report: ChildReport) -> ChildReport:
        """Let each file appear and read it back; the `report` of `merge`, with the files' hashes."""
        if not report.files:
            self._publish_files(calls)
            names = [file.name for file in self.plan.layout.weight_files]
            report.files = {name: self._files[name] for name in names}
        return report

    def publish(self, files: dict[str, bytes]) -> None:
        """Make the written files a checkpoint, with `files` (card, lineage) beside them."""
        vocabulary = self.plan.vocabulary
        # What was measured of a father that is a child itself says nothing about this one.
        removed = vocabulary.removed if vocabulary else frozenset()
        removed |= {ATTRIBUTION_FILE, ALIGNMENT_FILE}
        files = {**(vocabulary.companions if vocabulary else {}), **files}
        publish_companions(self.father, self.plan.layout, self.target, files, removed)
        self.target.delete_folder(PROGRESS)

    def _written_before(self, calls: Calls) -> ChildReport | None:
        """The report of this very child if it is there already, whole: a campaign may choose it twice."""
        try:
            lineage = read_document(self.target, LINEAGE_FILE, WRITTEN)
            self.target.info("config.json")
        except ObjectNotFoundError:
            return None
        if lineage.get("recipe_id") != self.recipe.id:
            raise BadInputError(
                f"{self.target.uri}: holds the child of another recipe; choose another place"
            )
        files = lineage["files"]
        given = [(self.target.uri, name) for name in files]
        for number, digest in calls.each("hash_file", given):
            name = given[number][1]
            if digest != files[name]:
                raise StorageError(
                    f"{self.target.uri}/{name}: is not what was written; remove the folder"
                )
        return ChildReport(files, lineage["tensors"])

    # -- progress ----------------------------------------------------------------------------

    def _open(self) -> None:
        """Take up what an earlier try has recorded, or begin."""
        try:
            manifest = read_manifest(self.target)
        except ObjectNotFoundError:
            self.target.discard_unfinished("")
            try:
                self._begin([file.name for file in self.plan.layout.weight_files])
                return
            except PreconditionFailedError:
                # Somebody else has just begun the same merge: both go on with it.
                manifest = read_manifest(self.target)
        if manifest["recipe"] != self.recipe.id:
            raise BadInputError(
                f"{self.target.uri}: holds the unfinished merge of another recipe "
                f"({manifest['recipe'][:12]}); remove the folder or choose another"
            )
        if manifest["cut"] != self._cut:
            raise BadInputError(
                f"{self.target.uri}: holds a merge that another version of Darwin began; finish it with "
                "that one, or remove the folder"
            )
        if manifest["uploads"].keys() != {file.name for file in self.plan.layout.weight_files}:
            raise BadInputError(
                f"{self.target.uri}/{MANIFEST}: names other files than this child has; remove the folder"
            )
        self._uploads = manifest["uploads"]
        self._files, reports = read_progress(self.target, {part.key for part in self.parts})
        lost = [name for name in self._uploads if not self._is_there(name)]
        for name in lost:
            self.target.discard_unfinished(name)  # of a try that was killed before the manifest
        if lost:
            self._begin(lost)
        # Records outlive the uploads that they are of.
        self._written = {
            (report["file"], report["number"]): report
            for report in reports
            if report["upload"] == self._uploads[report["file"]]
        }

    def _is_there(self, file: str) -> bool:
        """Whether a file is published, or its upload can be gone on with."""
        if file in self._files or self.target.parts_exist(file, self._uploads[file]):
            return True
        return self._size(file) is not None

    def _size(self, file: str) -> int | None:
        try:
            return self.target.info(file).size
        except ObjectNotFoundError:
            return None

    def _begin(self, files: list[str]) -> None:
        sizes = {file.name: file.size for file in self.plan.layout.weight_files}
        for name in files:
            if self._size(name) is not None:
                raise StorageError(
                    f"{self.target.uri}/{name}: a file that this merge has not written is in the way; "
                    "remove the folder or choose another"
                )
        begun: dict[str, str] = {}
        try:
            for name in files:
                begun[name] = self.target.begin_parts(name, sizes[name])
            self._announce(begun)
        except BaseException:
            # No record speaks of them, so they would fill the store unseen.
            for name, upload in begun.items():
                self.target.abandon_parts(name, upload)
            raise

    def _announce(self, begun: dict[str, str]) -> None:
        """Write the manifest; the first one only if there is none."""
        uploads = self._uploads | begun
        manifest = {"recipe": self.recipe.id, "cut": self._cut, "uploads": uploads}
        data = json.dumps(manifest).encode()
        if self._uploads:
            self.target.write(MANIFEST, data)
        else:
            self.target.create(MANIFEST, data)
        self._uploads = uploads

    @property
    def _cut(self) -> str:
        """What must be the same for parts of two tries to make one child."""
        parts = [(part.file, part.number, part.stop) for part in self.parts]
        return hashlib.sha256(repr((package_version(), parts)).encode()).hexdigest()

    def _record(self, content: dict[str, Any]) -> None:
        self.target.create(f"{PROGRESS}/{secrets.token_hex(8)}.json", json.dumps(content).encode())

    def _publish_files(self, calls: Calls) -> None:
        by_file: dict[str, list[Part]] = {}
        for part in self.parts:
            by_file.setdefault(part.file, []).append(part)
        files = [name for name in by_file if name not in self._files]
        given = []
        for name in files:
            reports = [self._written[part.key] for part in by_file[name]]
            checked = [
                (part.start, part.stop, report["checksum"])
                for part, report in zip(by_file[name], reports, strict=True)
            ]
            receipts = {report["number"]: report["receipt"] for report in reports}
            given.append((self.target.uri, name, self._uploads[name], checked, receipts))
        for number, digest in calls.each("publish_file", given):
            self._files[files[number]] = digest
            self._record({"files": {files[number]: digest}})

    def _report(self) -> ChildReport:
        changed: dict[str, dict[str, int]] = {}
        moved: dict[str, dict[str, list[int]]] = {}
        reach: dict[str, dict[str, list[int]]] = {}
        broken: dict[str, int] = {}
        fathers: dict[str, int] = {}
        for report in self._written.values():
            for name, counts in report["changed"].items():
                total = changed.setdefault(name, {})
                for parent, count in counts.items():
                    total[parent] = total.get(parent, 0) + count
            _add_lists(moved, report.get("moved", {}))
            _add_lists(reach, report.get("reach", {}))
            for total, counts in (
                (broken, report["not_finite"]),
                (fathers, report["not_finite_in_father"]),
            ):
                for name, count in counts.items():
                    total[name] = total.get(name, 0) + count
        tensors = []
        father = self.recipe.father.name
        for tensor in self.plan.child.tensors:
            way = self.assigned[self.plan.merged_as(tensor).name]
            is_fathers = way.copies and way.parents == (father,)
            tensors.append(
                {
                    "name": tensor.name,
                    "component": tensor.component,
                    "layer": tensor.layer,
                    "elements": tensor.elements,
                    "method": way.method.name,
                    "parameters": recorded_parameters(way),
                    "changed": changed.get(tensor.name, {}),
                    "moved": moved.get(tensor.name, {}),
                    "not_finite": broken.get(tensor.name, 0),
                }
            )
            # Of what is copied, too, a narrower dtype may not hold all.
            own = fathers.get(tensor.name, 0) if is_fathers else 0
            if broken.get(tensor.name, 0) > own:
                tensors[-1]["broken"] = broken[tensor.name]
            if tensor.name in reach and not changed[tensor.name].get(father):
                tensors[-1]["reach"] = reach[tensor.name]
            missed = changed.get(tensor.name, {}).get(way.parents[0], 0)
            if missed and self._is_copied(tensor, way):
                tensors[-1]["miscopied"] = missed
            if way.post is not None:
                tensors[-1]["post"] = {"method": way.post.name, "parameters": way.post_values}
        return ChildReport({}, tensors)

    def _is_copied(self, tensor: LogicalTensor, way: Assignment) -> bool:
        """Whether `tensor` should have one parent's stored bits, all of them, in their places."""
        source = self.plan.source(way.parents[0], tensor)
        return (
            way.copies
            and source is not None
            and source.dtype == tensor.dtype
            and source.shape == tensor.shape
            and not self.plan.has_mapped_rows(tensor)
            and self.plan.merged_as(tensor) is tensor  # a tied head gets the embedding's values
        )


def check_finite(report: ChildReport) -> None:
    """Raise `BadInputError` if a tensor holds a NaN or an infinity that is not the father's own."""
    bad = [tensor for tensor in report.tensors if tensor.get("broken")]
    if bad:
        raise BadInputError(
            f"tensor {bad[0]['name']!r} of the child has {bad[0]['broken']} elements that are NaN or "
            f"infinite ({len(bad)} such tensors): a parent is damaged, a parameter too large, or the dtype "
            "too narrow"
        )


def _add_lists(
    totals: dict[str, dict[str, list[int]]], report: dict[str, dict[str, list[int]]]
) -> None:
    for tensor, parents in report.items():
        total = totals.setdefault(tensor, {})
        for parent, counts in parents.items():
            known = total.setdefault(parent, [0] * len(counts))
            total[parent] = [one + other for one, other in zip(known, counts, strict=True)]
