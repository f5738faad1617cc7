"""A transformers model without weights, and the checkpoint that they are read from when they are needed.

transformers builds the model with its parameters on the meta device: it has shape and code, and takes no
memory. Weights are read as merges read them, whatever layout the checkpoint has, and get the bits that
`from_pretrained` gives them where it can read that layout.
"""

from __future__ import annotations

import mmap
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor
from workers.checkpoints.architecture import name_tensors
from workers.checkpoints.safetensors_format import TensorEntry
from workers.devices import check_device
from workers.diagnostics.layers import find_decoder
from workers.errors import BadInputError
from workers.merging.sources import DTYPE_NAMES, TORCH_DTYPES, Source
from workers.merging.threads import in_threads

FLOATING = {name for name, dtype in TORCH_DTYPES.items() if dtype.is_floating_point}

ITS_FILES_ALONE = {"local_files_only": True, "trust_remote_code": False}
"""How transformers reads a checkpoint: nothing from the hub, and no code of its own. If it is not told the
latter, it asks whoever sits at the terminal, and runs the code on a "y"."""

READ_ELEMENTS = 1 << 24
"""Elements that are read at once: what is computed on the way is as large, in fp32."""

ALIGNMENT = 64
"""Bytes: where torch's own tensors begin, which its kernels like."""

READ_THREADS = 16
"""Requests at a time to a store that is not this machine's disk."""


def not_loaded(place: str, what: str, error: Exception) -> BadInputError:
    """What to raise where transformers "cannot ..." with the checkpoint at `place`."""
    why = str(error)
    if "trust_remote_code" in why:
        why = "it needs code of its own, which Darwin does not run: use one that transformers knows by itself"
    return BadInputError(f"{place}: transformers cannot {what} ({why})")


class TensorSource(Protocol):
    """The values of logical tensors; `is_remote` if each read is a request to a store."""

    @property
    def is_remote(self) -> bool: ...
    def read(self, tensor: LogicalTensor, first: int, count: int) -> torch.Tensor: ...


class LazyModel:
    """The decoder of a checkpoint, whose weights are in memory while they are used.

    Reads any layout that merges read: fused or per-expert, FP8 codes with block scales, LoRA adapters, in
    local folders or remote stores. `dtype` is "auto" (the checkpoint's) or a torch dtype name; `device` a
    torch device. Raises `BadInputError` if transformers does not know the architecture, if a weight is
    missing, or if it is no stack of decoder layers.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str = "auto", device: str = "cpu") -> None:
        self.location = checkpoint.location
        check_device(device, "device", "give the workers a share of one, or use cpu")
        self.device = torch.device(device)
        self._map, self._source = self._open(checkpoint)
        with companion_folder(checkpoint) as folder:
            self.model, self.tokenizer = self._build(folder, dtype)
        self.decoder = find_decoder(self.model)
        self.layers = self.decoder.layers
        self._fp32 = _kept_in_fp32(self.model)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self._logical = self._pair_with_stored()
        self._drop(self._logical)  # buffers that the checkpoint stores are real so far
        self._held: set[str] = set()

    def _open(self, checkpoint: Checkpoint) -> tuple[ArchitectureMap, TensorSource]:
        """Which weights there are, and where their values come from: here those that are stored."""
        return ArchitectureMap.of(checkpoint), Source(checkpoint)

    def _build(self, folder: Path, dtype: str) -> tuple[Any, Any]:
        import transformers

        transformers.logging.set_verbosity_error()
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **ITS_FILES_ALONE)
            for holder in (config, config.get_text_config()):
                if hasattr(holder, "quantization_config"):
                    del holder.quantization_config  # the weights come as values
            kind = getattr(torch, dtype) if dtype != "auto" else self._own_dtype(config)
            with _parameters_on_meta():
                model = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=kind, trust_remote_code=False
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **ITS_FILES_ALONE)
        except (OSError, ValueError, KeyError) as error:
            what = "make a causal language model and its tokenizer of it"
            raise not_loaded(self.location, what, error) from error
        return model.eval().requires_grad_(False), tokenizer

    def _own_dtype(self, config: Any) -> torch.dtype:
        """As the configuration says, else that of most of the weights; BF16 for FP8 codes."""
        named = config.dtype or config.get_text_config().dtype
        if isinstance(named, torch.dtype):
            return named
        sizes: dict[str, int] = {}
        for tensor in self._map.tensors:
            if tensor.dtype in FLOATING:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.elements
        most = max(sizes, key=lambda name: (sizes[name], name), default="BF16")
        return torch.bfloat16 if most.startswith("F8") else TORCH_DTYPES[most]

    def _pair_with_stored(self) -> dict[str, list[LogicalTensor]]:
        """The decoder's tensors by their names in the model, in logical pieces that the checkpoint has."""
        prefix = f"{self.decoder.name}." if self.decoder.name else ""
        entries = [
            TensorEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), 0, 0)
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if name.startswith(prefix) and tensor.numel()
        ]
        pieces: dict[str, list[LogicalTensor]] = {entry.name: [] for entry in entries}
        kind = type(self.model).__name__
        for piece in name_tensors(entries, self.model.config.get_text_config().to_dict()):
            stored = self._map.by_name.get(piece.name)
            if stored is None:
                raise BadInputError(
                    f"{self.location}: lacks the weight {piece.name!r} of {kind}, or stores it in a form "
                    "that is not read"
                )
            if stored.shape != piece.shape:
                raise BadInputError(
                    f"{self.location}: tensor {piece.name!r} is stored as {list(stored.shape)}, {kind} wants "
                    f"{list(piece.shape)}"
                )
            if stored.values_dtype not in FLOATING:
                raise BadInputError(
                    f"{self.location}: tensor {piece.name!r} is {stored.values_dtype}, not floating point: "
                    "dequantize the checkpoint first"
                )
            pieces[piece.stored].append(piece)
        return pieces

    @property
    def materialized(self) -> int:
        """Elements of the decoder's stored tensors, parameters and buffers, that are in memory now."""
        tensors = (getattr(*self._place(name)) for name in self._logical)
        return sum(tensor.numel() for tensor in tensors if not tensor.is_meta)

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor of the model is loaded as."""
        if self._fp32 and self._fp32.search(name):
            return torch.float32
        tensor: torch.Tensor = getattr(*self._place(name))
        return tensor.dtype

    @contextmanager
    def loaded(self, chosen: Callable[[str], bool]) -> Iterator[None]:
        """The decoder's tensors with `chosen` names in memory, for the block's time."""
        names = [name for name in self._logical if chosen(name) and name not in self._held]
        try:
            self._load(names)
            yield
        finally:
            self._drop(names)

    def hold(self, first: int, last: int) -> None:
        """Keep layers `first` to `last - 1` in memory, and none but them."""
        inside = tuple(f"{layer.name}." for layer in self.layers[first:last])
        wanted = {name for name in self._logical if name.startswith(inside)}
        self._drop(self._held - wanted)
        self._held &= wanted
        for name in sorted(wanted - self._held):
            self._load([name])
            self._held.add(name)

    def has_experts(self, name: str) -> bool:
        """Whether a tensor of the model holds experts along its first dimension that are read one by one."""
        return all(piece.expert is not None for piece in self._logical[name])

    def read_experts(self, names: Sequence[str], experts: Sequence[int]) -> dict[str, torch.Tensor]:
        """These experts of tensors that hold experts, `[len(experts), ...]`, as the model would have them."""
        whole = [getattr(*self._place(name)) for name in names]
        kinds = [self.dtype_of(name) for name in names]
        sizes = [tensor[0].numel() for tensor in whole]
        memory = self._allocate(
            [(size * len(experts), kind) for size, kind in zip(sizes, kinds, strict=True)]
        )
        order = {expert: number for number, expert in enumerate(experts)}
        work = []
        for name, size, flat in zip(names, sizes, memory, strict=True):
            for piece in self._logical[name]:
                if piece.expert in order:
                    start = order[piece.expert] * size + piece.offset % size
                    part = flat[start : start + piece.elements]
                    work.append((self._map.by_name[piece.name], part))
        in_threads(self._fill, work, READ_THREADS if self._source.is_remote else 1)
        return {
            name: flat.view(len(experts), *tensor.shape[1:])
            for name, tensor, flat in zip(names, whole, memory, strict=True)
        }

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            module, own = self._place(name)
            shape = torch.empty_like(getattr(module, own), device="meta")
            # Buffers, too: one that stays would keep the mapping that it shares.
            setattr(module, own, _parameter(shape) if own in module._parameters else shape)

    def _load(self, names: list[str]) -> None:
        old = [getattr(*self._place(name)) for name in names]
        kinds = [self.dtype_of(name) for name in names]
        memory = self._allocate([(t.numel(), kind) for t, kind in zip(old, kinds, strict=True)])
        work = []
        for name, tensor, flat in zip(names, old, memory, strict=True):
            module, own = self._place(name)
            values = flat.view(tensor.shape)
            setattr(module, own, _parameter(values) if own in module._parameters else values)
            for piece in self._logical[name]:
                part = flat[piece.offset : piece.offset + piece.elements]
                work.append((self._map.by_name[piece.name], part))
        in_threads(self._fill, work, READ_THREADS if self._source.is_remote else 1)

    def _allocate(self, wanted: list[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
        """Flat tensors of so many elements and of these dtypes.

        Those on the CPU share one mapping, which goes back to the system as soon as the last of them is
        dropped: what `malloc` has once had of a layer it would keep, in holes of other sizes than the next
        layer wants.
        """
        if self.device.type != "cpu" or not wanted:
            return [torch.empty(size, dtype=kind, device=self.device) for size, kind in wanted]
        starts, end = [], 0
        for size, kind in wanted:
            starts.append(end)
            end += -(-size * kind.itemsize // ALIGNMENT) * ALIGNMENT
        private = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(private, dtype=torch.uint8)
        return [
            memory[start : start + size * kind.itemsize].view(kind)
            for start, (size, kind) in zip(starts, wanted, strict=True)
        ]

    @torch.inference_mode()  # each thread has its own mode
    def _fill(self, work: tuple[LogicalTensor, torch.Tensor]) -> None:
        stored, values = work
        for first in range(0, stored.elements, READ_ELEMENTS):
            count = min(READ_ELEMENTS, stored.elements - first)
            values[first : first + count].copy_(self._source.read(stored, first, count))

    def _place(self, name: str) -> tuple[torch.nn.Module, str]:
        holder, _, own = name.rpartition(".")
        return self.model.get_submodule(holder), own


@contextmanager
def companion_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder of this machine with the checkpoint's configuration and tokenizer."""
    if checkpoint.folder is not None:
        yield checkpoint.folder
        return
    with tempfile.TemporaryDirectory(prefix="darwin-") as folder:
        for name in checkpoint.companions:
            Path(folder, name).write_bytes(checkpoint.store.read(name))
        yield Path(folder)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device.

    Buffers are real first, as some (rotary frequencies, the scale of an embedding) are in no checkpoint.
    """
    register = torch.nn.Module.register_parameter

    def register_on_meta(
        module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None
    ) -> None:
        if parameter is not None and not parameter.is_meta:
            # Memory that was allocated for it was not touched yet, so was never taken.
            parameter = _parameter(torch.empty_like(parameter, device="meta"))
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _parameter(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)


def _kept_in_fp32(model: Any) -> re.Pattern[str] | None:
    """The names of tensors that transformers loads as fp32 whatever the model's dtype is."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if model.dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not names or model.dtype not in (torch.float16, torch.bfloat16):
        return None
    return re.compile(
        "|".join(name.replace(".", r"\.").replace("*", ".*") for name in sorted(names))
    )
