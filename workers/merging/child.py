"""Merge the parts of a child and write them: what a worker does of a merge."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from awscrt import checksums

from workers.checkpoints.health import count_not_finite
from workers.merging.differences import count_by_steps, count_moved, sample
from workers.merging.executor import Run
from workers.merging.parts import Part
from workers.merging.plan import BASE, MergeUnit
from workers.merging.sources import TORCH_DTYPES
from workers.merging.threads import in_threads
from workers.storage import ObjectNotFoundError, PreconditionFailedError, StorageError, Store

READ_BYTES = 8 << 20
COMPARE_ELEMENTS = 1 << 18


@dataclass
class PartReport:
    """A part that was written: the store's receipt, and what its elements are like."""

    file: str
    number: int
    receipt: str
    checksum: int
    """CRC-64/NVME of the bytes, taken before they were written."""
    changed: dict[str, dict[str, int]] = field(default_factory=dict)
    """Logical tensor -> parent -> how many elements of the child differ from it."""
    moved: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Logical tensor -> parent -> how many of a sample of its elements differ by more than rounding (see
    `differences`), and how many there are in the sample."""
    reach: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Where parents were blended, yet each element is the father's: logical tensor -> mother -> how far she
    is from what the blend begins with, the base or the father (`differences.count_by_steps` of a sample)."""
    not_finite: dict[str, int] = field(default_factory=dict)
    """Logical tensor -> elements that are NaN or infinite, where there are any."""
    not_finite_in_father: dict[str, int] = field(default_factory=dict)
    """The same of the father's own values, where the child has any."""


def write_parts(
    run: Run,
    parts: Iterable[Part],
    target: Store,
    uploads: dict[str, str],
    threads: int = 1,
) -> list[PartReport]:
    """Merge `parts` and write them into the open `uploads` (file -> id) of `target`.

    Memory: for each thread a part, and the values of a unit of each parent that is read from a remote
    store.
    """
    reports: list[PartReport] = []
    headers = {file.name: file.header.raw for file in run.plan.layout.weight_files}

    def write(part: Part) -> None:
        size = part.stop - part.start
        buffer = run.merger.buffers.bytes(size)
        written = PartReport(part.file, part.number, "", 0)
        data = _fill_part(run, part, headers[part.file], buffer, written)
        written.checksum = checksums.crc64nvme(data)
        written.receipt = target.write_part(
            part.file, uploads[part.file], part.number, part.start, data
        )
        reports.append(written)

    in_threads(write, parts, threads)
    return reports


def _fill_part(
    run: Run, part: Part, header: bytes, buffer: torch.Tensor, report: PartReport
) -> memoryview:
    """The bytes of a part, in `buffer`; what its units are like goes into `report`."""
    data: memoryview = buffer.numpy().data
    position = 0
    if part.start == 0:
        data[: len(header)] = header
        position = len(header)
    for unit in part.units:
        dtype = TORCH_DTYPES[unit.target.dtype]
        size = unit.count * dtype.itemsize
        place = buffer[position : position + size]
        aligned = (buffer.data_ptr() + position) % dtype.itemsize == 0
        values = place.view(dtype) if aligned and size else torch.empty(unit.count, dtype=dtype)
        run.fill(unit, values)
        if not aligned:
            place.copy_(values.view(torch.uint8))
        _describe(run, unit, values, report)
        position += size
    return data


def _describe(run: Run, unit: MergeUnit, values: torch.Tensor, report: PartReport) -> None:
    name = unit.target.name
    changed = report.changed.setdefault(name, {})
    broken = count_not_finite(_bytes(values).data, unit.target.dtype)
    if broken:
        report.not_finite[name] = report.not_finite.get(name, 0) + broken
    for number, parent in enumerate(run.merger.parents):
        source = run.plan.source(parent, unit.target)
        if source is not None and (
            source.shape == unit.target.shape or run.plan.has_mapped_rows(unit.target)
        ):
            own = run.read(parent, unit.target, unit.first, unit.count)
            differing = count_changes(values, own)
            changed[parent] = changed.get(parent, 0) + differing
            total = report.moved.setdefault(name, {}).setdefault(parent, [0, 0])
            looked_at = sample(values)
            total[0] += count_moved(looked_at, sample(own)) if differing else 0
            total[1] += len(looked_at)
            if not differing and number == 0:
                _describe_unchanged(run, unit, own, report)
            if broken and number == 0:
                fathers = int((~torch.isfinite(own.double())).sum())
                found = report.not_finite_in_father
                found[name] = found.get(name, 0) + fathers


def _describe_unchanged(
    run: Run, unit: MergeUnit, father: torch.Tensor, report: PartReport
) -> None:
    """Where a blend has left every element as the father's: how much of the mothers there was to be seen."""
    way, tensor = run.way(unit.target), unit.tensor
    if way.copies:
        return
    # A mother adds her difference to the base where there is one: none, if she is as it is there.
    has_base = way.uses_base(run.recipe.base is not None) and run.plan.source(BASE, tensor)
    begin = run.read(BASE, tensor, unit.first, unit.count) if has_base else father
    for mother in [name for name in way.parents if name != run.recipe.father.name]:
        own = run.read(mother, tensor, unit.first, unit.count)
        counts = count_by_steps(sample(own).to(father.dtype), sample(begin))
        bins = report.reach.setdefault(unit.target.name, {}).setdefault(mother, [0] * len(counts))
        for number, count in enumerate(counts):
            bins[number] += count


def count_changes(values: torch.Tensor, others: torch.Tensor) -> int:
    """How many of `values` have other bits than `others`, rounded to their dtype."""
    # numpy compares and counts ten times as fast as torch, and fresh memory costs more than both.
    integer = f"u{values.element_size()}"
    differ = numpy.empty(min(COMPARE_ELEMENTS, len(values)), bool)
    total = 0
    for first in range(0, len(values), COMPARE_ELEMENTS):
        one, other = (v[first : first + COMPARE_ELEMENTS] for v in (values, others))
        mine, theirs = (_bytes(v).view(integer) for v in (one, other.to(values.dtype)))
        found = numpy.not_equal(mine, theirs, out=differ[: len(one)])
        total += int(numpy.count_nonzero(found))
    return total


def _bytes(values: torch.Tensor) -> Any:
    return values.contiguous().view(torch.uint8).numpy()


def publish_file(
    target: Store,
    file: str,
    upload: str,
    parts: list[tuple[int, int, int]],
    receipts: dict[int, str],
) -> str:
    """Publish a file whose parts are all written, and read it back; its SHA-256.

    `parts`: (start, stop, checksum) of each part in order. Raises `StorageError` if the store does not
    hold what was written.
    """
    size = parts[-1][1]
    # The target belongs to one recipe, whose bytes are always the same: a file that is there was
    # published by an earlier try of this merge. Anything else of that name is not ours to replace.
    if _size(target, file) is None:
        with suppress(PreconditionFailedError):
            target.finish_parts(file, upload, receipts)
    else:
        target.abandon_parts(file, upload)  # what a publisher that was killed may have left
    found = _size(target, file)
    if found != size:
        raise StorageError(
            f"{target.uri}/{file}: a file of {found} bytes is in the way of one of {size}; remove the "
            "folder or choose another"
        )
    digest = hashlib.sha256()
    with closing(_read_ahead(target, file, [(start, stop) for start, stop, _ in parts])) as pieces:
        for start, stop, expected in parts:
            checksum = 0
            for first in range(start, stop, READ_BYTES):
                piece = next(pieces)
                assert len(piece) == min(READ_BYTES, stop - first)
                digest.update(piece)
                checksum = checksums.crc64nvme(piece, checksum)
            target.forget(file)
            if checksum != expected:
                raise StorageError(
                    f"{target.uri}/{file}: bytes {start} to {stop} are not what was written: the "
                    "store damaged them, or somebody else writes there; remove the folder and merge "
                    "again"
                )
    return digest.hexdigest()


def hash_file(target: Store, file: str) -> str:
    """The SHA-256 of a whole file."""
    digest = hashlib.sha256()
    with closing(_read_ahead(target, file, [(0, target.info(file).size)])) as pieces:
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()


def _read_ahead(
    target: Store, file: str, stretches: list[tuple[int, int]]
) -> Generator[memoryview, None, None]:
    """The bytes of these stretches, in pieces; each is valid until the next one is asked for.

    A piece is read while the one before it is worked on, as both take about as long. To be closed: were its
    thread ended by the garbage collector, that could be while another one starts, which would wait for ever.
    """
    spans = [
        (first, min(first + READ_BYTES, stop))
        for start, stop in stretches
        for first in range(start, stop, READ_BYTES)
    ]
    buffers = [memoryview(bytearray(READ_BYTES)) for _ in range(2)]

    def read(number: int) -> memoryview:
        start, stop = spans[number]
        piece = buffers[number % 2][: stop - start]
        target.read_into(file, start, piece)
        return piece

    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(read, 0) if spans else None
        for number in range(len(spans)):
            assert upcoming is not None
            piece = upcoming.result()
            if number + 1 < len(spans):
                upcoming = reader.submit(read, number + 1)
            yield piece


def _size(target: Store, file: str) -> int | None:
    try:
        return target.info(file).size
    except ObjectNotFoundError:
        return None
