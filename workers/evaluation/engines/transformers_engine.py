"""The transformers engine: any `AutoModelForCausalLM`, on CPU or CUDA, with merges in its live weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from workers.checkpoints import ArchitectureMap, Checkpoint, localize
from workers.checkpoints.architecture import name_tensors
from workers.checkpoints.safetensors_format import TensorEntry
from workers.devices import check_device
from workers.diagnostics.lazy_model import ITS_FILES_ALONE, not_loaded
from workers.errors import BadInputError
from workers.evaluation.engine import Continuation, Decoding, Generation, Prompt, Reading
from workers.evaluation.engines.fingerprint import describe_prompts
from workers.evaluation.engines.forward import Ids, LiveModel
from workers.evaluation.engines.generating import Ending, GenerationPlan, generate, plan_generation
from workers.evaluation.engines.likelihood import LikelihoodPlan, loglikelihoods, plan_likelihoods
from workers.evaluation.engines.memory import Memory
from workers.evaluation.engines.reading import read_texts
from workers.evaluation.engines.tokenizing import (
    can_express,
    encode_pairs,
    encode_prompts,
    load_tokenizer,
)
from workers.merging import CARRIED, Recipe
from workers.merging.executor import Merger
from workers.merging.sources import DTYPE_NAMES

DEFAULT_BATCH = 32

PLANNED_NUMBERS = 1 << 24
"""Of what was planned for calls: 128 MB of token ids and places. Items never change, so their plans serve
every candidate."""


class TransformersEngine:
    """One live model, built from the father, that takes the weights of any recipe over the parents.

    `dtype` is "auto" (the checkpoint's) or a torch dtype name such as "float32"; `device` a torch
    device; `threads` the CPU threads of one operation; `batch_size` the texts that it reads or writes at
    once: a call may have many more. Remote checkpoints are copied to this machine
    first (`localize`). Raises `BadInputError` if transformers cannot load the father completely.
    """

    def __init__(
        self,
        parents: dict[str, Checkpoint],
        base: Checkpoint | None,
        dtype: str = "auto",
        device: str = "cpu",
        threads: int = 1,
        batch_size: int = DEFAULT_BATCH,
    ) -> None:
        import transformers

        prepare(device, threads)
        parents = {name: self._place(parent) for name, parent in parents.items()}
        self.father = next(iter(parents.values()))
        self.device = torch.device(device)
        self.threads = threads
        self.tokenizer = load_tokenizer(self.father)
        self.model = self._load_model(transformers, dtype)
        self.merger = Merger(
            parents, self._place(base) if base else None, device, keep_statistics=True
        )
        self.views = self._live_views()
        self.live = LiveModel(self.model, self.device, batch_size)
        self._plans = Memory(PLANNED_NUMBERS)

    def _place(self, checkpoint: Checkpoint) -> Checkpoint:
        """A parent, or the base, where its weights are read again and again."""
        return localize(checkpoint)

    def _load_model(self, transformers: Any, dtype: str) -> Any:
        try:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                self.father.folder,
                config=self._child_config(transformers),
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                **ITS_FILES_ALONE,
            )
        except (OSError, ValueError, KeyError) as error:
            what = "load it as a causal language model"
            raise not_loaded(self.father.location, what, error) from error
        if loading["missing_keys"]:
            raise BadInputError(
                f"{self.father.location}: lacks weights of {type(model).__name__}: "
                f"{', '.join(sorted(loading['missing_keys'])[:5])}"
            )
        self._make_greedy(model, transformers)
        return model.to(self.device).eval().requires_grad_(False)

    def _make_greedy(self, model: Any, transformers: Any) -> None:
        """Whatever sampling or penalties the father's generation_config.json asks for.

        Only the tokens that end an answer are taken from it; the tokenizer's own ends one, too, as in vLLM: a
        conversation's turn may end by it where no such file says so.
        """
        ends = model.generation_config.eos_token_id
        several = ends if isinstance(ends, list) else [ends]
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=sorted({*several, self.tokenizer.eos_token_id} - {None}),
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _child_config(self, transformers: Any) -> Any:
        """The configuration of a child where the father's is another, as his weights are FP8 codes.

        These are loaded as if they were values; the first recipe overwrites them, as every weight.
        """
        if not ArchitectureMap(self.father).scales:
            return None
        config = transformers.AutoConfig.from_pretrained(self.father.folder, **ITS_FILES_ALONE)
        for holder in (config, config.get_text_config()):
            if hasattr(holder, "quantization_config"):
                del holder.quantization_config
        return config

    def _live_views(self) -> dict[str, torch.Tensor]:
        """Flat views of the live weights by logical name, for every tensor of the father in the model.

        Of weights that share memory (a tied `lm_head`) only the first that the father stores is
        written, as `from_pretrained` ties the rest to it.
        """
        weights = self.model.state_dict()
        entries = [
            TensorEntry(name, DTYPE_NAMES[weight.dtype], tuple(weight.shape), 0, 0)
            for name, weight in weights.items()
        ]
        text_config = self.model.config.get_text_config().to_dict()
        stored = self.merger.plan.father.by_name
        views: dict[str, torch.Tensor] = {}
        owners: dict[tuple[int, int], str] = {}
        aliases = set()
        for live in name_tensors(entries, text_config):
            if live.name not in stored:
                continue
            view = weights[live.stored].view(-1)[live.offset : live.offset + live.elements]
            if (
                view.numel()
                and not view.is_meta
                and owners.setdefault((view.data_ptr(), view.numel()), live.name) != live.name
            ):
                if live.name != self.merger.plan.tied:
                    raise BadInputError(
                        f"{self.father.location}: stores {live.name!r}, which "
                        f"{type(self.model).__name__} ties to another tensor: remove it, or say "
                        "tie_word_embeddings in config.json"
                    )
                aliases.add(live.name)
                continue
            if stored[live.name].shape != live.shape:
                raise BadInputError(
                    f"{self.father.location}: tensor {live.name!r} is stored as "
                    f"{list(stored[live.name].shape)}, {type(self.model).__name__} wants {list(live.shape)}"
                )
            views[live.name] = view
        for tensor in stored.values():
            missing = tensor.name not in views and tensor.name not in aliases
            if missing and tensor.component not in CARRIED:
                raise BadInputError(
                    f"{self.father.location}: tensor {tensor.stored!r} has no counterpart in "
                    f"{type(self.model).__name__}, so its merge could not be evaluated"
                )
        return views

    converts_weights = False

    def realize(self, recipe: Recipe) -> None:
        """See `Engine.realize`."""
        self.merger.realize(recipe, self.views)

    @torch.inference_mode()
    def loglikelihood(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Continuation]:
        """See `Engine.loglikelihood`. The continuation's tokens are those that prompt + continuation
        has beyond the tokens of the prompt."""
        if not pairs:
            return []
        plan: LikelihoodPlan = self._plans.of(tuple(pairs), self._plan_likelihoods)
        return loglikelihoods(self.live, plan)

    def _plan_likelihoods(self, pairs: tuple[tuple[Prompt, str], ...]) -> LikelihoodPlan:
        wholes, starts = encode_pairs(self.tokenizer, pairs)
        return plan_likelihoods(self.live, _arrays(wholes), starts, [prompt for prompt, _ in pairs])

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, seeds: Sequence[int] = ()
    ) -> list[Generation]:
        """See `Engine.generate`."""
        assert decoding.temperature == 0 or len(seeds) == len(prompts), "a prompt, a seed"
        plan: GenerationPlan = self._plans.of(tuple(prompts), self._plan_generation)
        ends = self.model.generation_config.eos_token_id
        return generate(self.live, plan, decoding, seeds, Ending(self.tokenizer, decoding, ends))

    def _plan_generation(self, prompts: tuple[Prompt, ...]) -> GenerationPlan:
        return plan_generation(self.live, _arrays(encode_prompts(self.tokenizer, prompts)))

    def read(self, texts: Sequence[tuple[str, str]]) -> Reading:
        """See `Engine.read`."""
        return read_texts(self.model, self.tokenizer, texts)

    def expresses(self, text: str) -> bool:
        """See `Engine.expresses`."""
        return can_express(self.tokenizer, text)

    def describe(self, prompt: Prompt) -> dict[str, Any]:
        """See `Engine.describe`."""
        import transformers

        return {
            "engine": "transformers",
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "model": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": (
                torch.cuda.get_device_name(self.device)
                if self.device.type == "cuda"
                else f"cpu {torch.backends.cpu.get_cpu_capability()}"
            ),
            "threads": self.threads,
            "batch_size": self.live.rows,
            **describe_prompts(self.tokenizer, prompt),
        }


def _arrays(ids: Sequence[list[int]]) -> list[Ids]:
    return [np.array(one, dtype=np.int64) for one in ids]


def prepare(device: str, threads: int) -> None:
    """Make this process one that computes. Raises `BadInputError` if there is no such device."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    advice = "give workers.gpus a share of one, or set engine.device to cpu"
    check_device(device, "engine.device", advice)
