"""Names of devices that models run on."""

from __future__ import annotations

import re

from workers.errors import BadInputError


def is_device(name: str) -> bool:
    """Whether it names a kind of device that is known: cpu, cuda, or cuda:NUMBER."""
    return re.fullmatch(r"cpu|cuda(:\d+)?", name) is not None


def check_device(name: str, key: str, advice: str) -> None:
    """Raise `BadInputError` if this process has no such device. `key` is where it was asked for."""
    if not is_device(name):
        raise BadInputError(f"{key}: {name!r} is neither cpu nor cuda")
    if name == "cpu":
        return
    import torch

    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        seen = f"sees {count} CUDA devices" if count else "sees no CUDA device"
        raise BadInputError(f"{key}: {name}, but this process {seen}: {advice}")
