"""A model that is larger than memory, run one decoder layer at a time.

transformers builds the model with its parameters on the meta device, so it has shape and code but no
weights. The decoder is run once per prompt with its layers short-cut: what it hands to each of them
(masks, rotary embeddings, positions, per-layer inputs) is kept, and the first one's hidden state. Then
each layer's weights are read from the checkpoint, the layer is called for every prompt with what the
decoder would have handed to it, and the weights are dropped. So the model's own code runs, whatever its
architecture, and gives the bits that it gives in one piece. What a decoder does between its layers would
be passed over: a model that does anything there is refused.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from workers.checkpoints import ArchitectureMap, Checkpoint, LogicalTensor
from workers.checkpoints.architecture import name_tensors
from workers.checkpoints.safetensors_format import TensorEntry
from workers.diagnostics.layers import DecoderLayer, find_decoder
from workers.errors import BadInputError
from workers.merging.executor import in_threads
from workers.merging.sources import TORCH_DTYPES, Source

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
FLOATING = {name for name, dtype in TORCH_DTYPES.items() if dtype.is_floating_point}

READ_ELEMENTS = 1 << 24
"""Elements that are read at once: what is computed on the way is as large, in fp32."""

READ_THREADS = 16
"""Requests at a time to a store that is not this machine's disk."""


class _ChangedBetweenLayersError(Exception):
    """A layer gets another hidden state than the one before it has returned."""


@dataclass(frozen=True, slots=True)
class _LayerCall:
    """What the decoder hands to a layer beside the hidden state."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class StreamedModel:
    """The decoder of a checkpoint, whose weights are in memory while they are used.

    Reads any layout that merges read: fused or per-expert, FP8 codes with block scales, LoRA adapters, in
    local folders or remote stores. `dtype` is "auto" (the checkpoint's) or a torch dtype name; `device` a
    torch device. Raises `BadInputError` if transformers does not know the architecture, if a weight is
    missing, or if it is no stack of decoder layers.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str = "auto", device: str = "cpu") -> None:
        self.location = checkpoint.location
        self.device = torch.device(device)
        self._map = ArchitectureMap.of(checkpoint)
        self._source = Source(checkpoint)
        with companion_folder(checkpoint) as folder:
            self.model, self.tokenizer = self._build(folder, dtype)
        self.decoder = find_decoder(self.model)
        self.layers = self.decoder.layers
        self._fp32 = _kept_in_fp32(self.model)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self._logical = self._pair_with_stored()
        self._calls: list[list[_LayerCall]] = []

    def _build(self, folder: Path, dtype: str) -> tuple[Any, Any]:
        import transformers

        transformers.logging.set_verbosity_error()
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            for holder in (config, config.get_text_config()):
                if hasattr(holder, "quantization_config"):
                    del holder.quantization_config  # the weights come as values
            kind = getattr(torch, dtype) if dtype != "auto" else self._own_dtype(config)
            with _parameters_on_meta():
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise BadInputError(
                f"{self.location}: transformers cannot make a causal language model and its tokenizer of it "
                f"({error})"
            ) from error
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
        """The decoder's tensors by their names in the model, in logical pieces, all found in the checkpoint."""
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
                    f"{self.location}: lacks the weight {piece.name!r} of {kind}, or stores it in a form that "
                    "is not read"
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
        """Elements of the parameters that are in memory now."""
        return sum(weight.numel() for weight in self.model.parameters() if not weight.is_meta)

    @contextmanager
    def loaded(self, chosen: Callable[[str], bool]) -> Iterator[None]:
        """The decoder's tensors with `chosen` names in memory, for the block's time."""
        names = [name for name in self._logical if chosen(name)]
        try:
            self._load(names)
            yield
        finally:
            for name in names:
                module, own = self._place(name)
                if own in module._parameters:
                    old = module._parameters[own]
                    assert old is not None
                    setattr(module, own, _parameter(torch.empty_like(old, device="meta")))

    def _load(self, names: list[str]) -> None:
        work = []
        for name in names:
            module, own = self._place(name)
            old = getattr(module, own)
            dtype = torch.float32 if self._fp32 and self._fp32.search(name) else old.dtype
            values = torch.empty(old.shape, dtype=dtype, device=self.device)
            setattr(module, own, _parameter(values) if own in module._parameters else values)
            for piece in self._logical[name]:
                flat = values.view(-1)[piece.offset : piece.offset + piece.elements]
                work.append((self._map.by_name[piece.name], flat))
        in_threads(self._fill, work, READ_THREADS if self._source.is_remote else 1)

    def _fill(self, work: tuple[LogicalTensor, torch.Tensor]) -> None:
        stored, values = work
        for first in range(0, stored.elements, READ_ELEMENTS):
            count = min(READ_ELEMENTS, stored.elements - first)
            values[first : first + count].copy_(self._source.read(stored, first, count))

    def _place(self, name: str) -> tuple[torch.nn.Module, str]:
        holder, _, own = name.rpartition(".")
        return self.model.get_submodule(holder), own

    def outside_layers(self, name: str) -> bool:
        """Whether a tensor of the decoder belongs to none of its layers: embeddings, the last norm."""
        return not name.startswith(tuple(f"{layer.name}." for layer in self.layers))

    @torch.inference_mode()
    def begin(self, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The hidden states at the first layer of `prompts`, token ids `[1, tokens]`.

        What the decoder hands to its layers is kept for `run_span`.
        """
        with self.loaded(self.outside_layers):
            recorded = [self._record(prompt) for prompt in prompts]
        self._calls = [calls for _, calls in recorded]
        return [hidden for hidden, _ in recorded]

    def _record(self, prompt: torch.Tensor) -> tuple[torch.Tensor, list[_LayerCall]]:
        """The first layer's hidden state, and the decoder's call of each layer."""
        for returns_tuple in (False, True):  # decoders expect the one or the other of their layers
            try:
                return self._shortcut(prompt, returns_tuple)
            except _ChangedBetweenLayersError:
                continue
        raise BadInputError(
            f"{self.location}: {type(self.model).__name__} does more between its layers than to hand on hidden "
            "states: it can only be probed whole"
        )

    def _shortcut(
        self, prompt: torch.Tensor, returns_tuple: bool
    ) -> tuple[torch.Tensor, list[_LayerCall]]:
        calls: list[_LayerCall] = []
        states: list[torch.Tensor] = []

        def stand_in(index: int, *arguments: Any, **keywords: Any) -> Any:
            state = arguments[0] if arguments else keywords.pop("hidden_states")
            if index != len(calls) or not _is_same(state, states[0] if states else state):
                raise _ChangedBetweenLayersError
            states.append(state)
            calls.append(_LayerCall(arguments[1:], keywords))
            return (state,) if returns_tuple else state

        with ExitStack() as shortcuts:
            for layer in self.layers:
                shortcuts.enter_context(_forward_replaced(layer, partial(stand_in, layer.index)))
            self.decoder.module(input_ids=prompt.to(self.device), use_cache=False)
        assert len(calls) == len(self.layers)
        return states[0], calls

    @torch.inference_mode()
    def run_span(
        self,
        first: int,
        last: int,
        hidden_states: Sequence[torch.Tensor],
        around: Callable[[DecoderLayer, int, Callable[[], torch.Tensor]], torch.Tensor]
        | None = None,
    ) -> list[torch.Tensor]:
        """The hidden states behind layer `last - 1`, from those at layer `first`.

        One for each prompt that `begin` was given, here or by the caller's other workers: spans that
        follow one another give what the whole decoder gives. `around` is called for each layer and
        prompt, by its number, with what runs the layer.
        """
        states = [state.to(self.device) for state in hidden_states]
        assert len(states) == len(self._calls), "begin comes first, with the same prompts"
        for layer in self.layers[first:last]:
            self._check_state(layer.index, first)
            with self.loaded(lambda name, own=layer.name: name.startswith(f"{own}.")):  # type: ignore[misc]
                for number, state in enumerate(states):
                    run = partial(self._run, layer, self._calls[number][layer.index], state)
                    states[number] = around(layer, number, run) if around else run()
        return states

    def _run(self, layer: DecoderLayer, call: _LayerCall, state: torch.Tensor) -> torch.Tensor:
        output = layer.module(state, *call.arguments, **call.keywords)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, torch.Tensor)
        return result

    def _check_state(self, index: int, first: int) -> None:
        """What layers write for later ones (Gemma 4's shared keys and values) is not in the hidden state."""
        if index != first or first == 0:
            return
        for name, value in self._calls[0][index].keywords.items():
            if isinstance(value, Mapping) and not value:
                raise BadInputError(
                    f"{self.location}: the layers of {type(self.model).__name__} share {name!r}: they cannot "
                    "be divided into spans"
                )


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

    Their buffers are real, as some (rotary frequencies, the scale of an embedding) are in no checkpoint.
    """
    register = torch.nn.Module.register_parameter

    def register_on_meta(
        module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None
    ) -> None:
        if parameter is not None and not parameter.is_meta:
            # Memory that was allocated for it was not touched yet, so was never taken.
            parameter = _parameter(torch.empty_like(parameter, device="meta"))
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _forward_replaced(layer: DecoderLayer, forward: Callable[..., Any]) -> Iterator[None]:
    layer.module.forward = forward
    try:
        yield
    finally:
        del layer.module.forward


def _is_same(one: Any, two: torch.Tensor) -> bool:
    """Whether it is the same memory, seen in the same way."""
    return (
        isinstance(one, torch.Tensor)
        and one.data_ptr() == two.data_ptr()
        and (one.shape, one.stride()) == (two.shape, two.stride())
    )


def _parameter(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)


def _kept_in_fp32(model: Any) -> re.Pattern[str] | None:
    """The names of tensors that transformers loads as fp32 whatever the model's dtype is."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if model.dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not names or model.dtype not in (torch.float16, torch.bfloat16):
        return None
    return re.compile("|".join(name.replace(".", r"\.").replace("*", ".*") for name in sorted(names)))
