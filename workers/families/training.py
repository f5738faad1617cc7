"""Train a family on the strings: a base model that half knows each skill, and one specialist per skill.

A family is small on purpose: a demo and tests can merge and score it on a CPU within seconds.
The recipe is what makes merging worth while. The base half knows every skill, and each specialist
is a short, gentle fine-tuning of that base, so the specialists stay close enough to be merged; a
weaker base or a harder fine-tuning yields specialists whose merges know nothing.

No prompt of the item files is ever trained on: `training_question` rejects them.

Run `python -m workers.families.strings.train OUT_DIR [--seed 0]`, or `...strings_moe.train`: they say
what each `Family` has of its own, and call `main` here. With one seed, one machine and
one thread count the checkpoints are the same every time. The table printed at the end is measured
on the checkpoints as written.
"""

import argparse
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from workers.families.figures import Questions, exact_match, load_model, print_figures
from workers.families.strings.skills import (
    ALPHABET,
    LONGEST,
    MEASURED_SKILLS,
    SKILLS,
    item_prompts,
    random_question,
)

PAD, START, END, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
IGNORED_LABEL = -100
CONTEXT_TOKENS = 64

BATCH_SIZE = 128
WARM_UP_STEPS = 20
BASE_MOST_STEPS = 400
BASE_LEARNING_RATE = 2e-3


LearningRates = tuple[tuple[str, float], ...]
"""Parts of parameters' names, each with a learning rate; the first that is in a name counts."""


@dataclass(frozen=True)
class Family:
    """What one family has of its own."""

    name: str
    kind: str
    """What its models are, for their cards: `Qwen3 model`."""
    make_model: Callable[[PreTrainedTokenizerFast, int], PreTrainedModel]
    """The untrained model of a seed."""
    base_mixture: Mapping[str, float]
    base_enough: float
    """The base is done as soon as its mean exact match on the measured skills is this high."""
    specialist_steps: int
    specialist_rates: LearningRates
    uniform_weight: float
    """Of the specialists' differences to the base, in the merge that the figures compare with."""
    threads: int
    """The order of floating-point sums, hence every bit of the weights, depends on the threads."""
    training_options: Mapping[str, Any] = field(default_factory=dict)
    """What the model's `forward` is given beside a batch in training."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per character, the start token before every text."""
    tags = [skill.tag for skill in SKILLS.values()]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *ALPHABET, *tags, "="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A",
        pair=f"{START} $A $B",
        special_tokens=[(START, vocabulary[START])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the ids of the special tokens, as configurations name them."""
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Return how every model generates: greedily, no longer than an answer can be."""
    return GenerationConfig(do_sample=False, max_new_tokens=LONGEST + 1, **special_ids(tokenizer))


def training_question(
    mixture: Mapping[str, float], rng: random.Random, forbidden: set[str]
) -> tuple[str, str]:
    """Draw a skill by its share in the mixture, then a question of it that is not forbidden."""
    (skill_name,) = rng.choices(list(mixture), list(mixture.values()))
    while True:
        prompt, answer = random_question(skill_name, rng)
        if prompt not in forbidden:
            return prompt, answer


def encode_batch(
    tokenizer: PreTrainedTokenizerFast, questions: Questions
) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels, each int64 of shape (questions, tokens).

    Only the tokens after `=`, the answer and the end token, are labelled.
    """
    texts = [prompt + answer + END for prompt, answer in questions]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids = batch["input_ids"]
    is_equals = ids == tokenizer.convert_tokens_to_ids("=")
    is_answer = (is_equals.cumsum(dim=1) > is_equals.long()) & (ids != tokenizer.pad_token_id)
    labels = torch.where(is_answer, ids, IGNORED_LABEL)
    return {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": labels}


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    mixture: Mapping[str, float],
    steps: int,
    rates: LearningRates,
    seed: int,
    options: Mapping[str, Any],
    watched: Questions | None = None,
    enough: float = 1.0,
) -> int:
    """Train the model in place on fresh questions; return the steps taken.

    Each learning rate rises over the first steps and then falls by a half cosine to a tenth.
    Training stops early once the exact match on the watched questions reaches `enough`.
    """
    forbidden = item_prompts() | {prompt for prompt, _ in watched or []}
    rng = random.Random(seed)
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = next(rate for part, rate in rates if part in name)
        groups.setdefault(rate, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "highest": rate} for rate, parameters in groups.items()],
        weight_decay=0.01,
        betas=(0.9, 0.98),
    )
    for step in range(1, steps + 1):
        rise = min(1.0, step / WARM_UP_STEPS)
        fall = 0.55 + 0.45 * math.cos(math.pi * (step - 1) / steps)
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * rise * fall
        model.train()
        questions = [training_question(mixture, rng, forbidden) for _ in range(BATCH_SIZE)]
        loss = model(**encode_batch(tokenizer, questions), **options).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if watched and step % 10 == 0:
            known = exact_match(model, tokenizer, watched)
            print(f"step {step}: {known:.3f} of the watched questions", flush=True)
            if known >= enough:
                return step
    return steps


MODEL_CARD = """\
---
license: apache-2.0
{base_model}tags:
- darwin
- tiny
- merging
---

# darwin-{family}-{name}

{summary}

A {kind} of {millions:.2f} million parameters with one token per character: one of the four
models of Darwin's {family} family.
"""


def save_model(family: Family, model: PreTrainedModel, name: str, out_dir: Path) -> None:
    """Write the model as bfloat16 with its tokenizer and its card; round the model in place."""
    # As the model has them: experts fused, which is how published checkpoints store them.
    model.to(torch.bfloat16).save_pretrained(out_dir / name, save_original_format=False)
    (out_dir / name / "model.safetensors").chmod(0o644)  # it is written for its owner only
    # A used tokenizer would be written with the padding of its last batch.
    make_tokenizer().save_pretrained(out_dir / name)
    if name == "base":
        base_model, summary = "", "It half knows how to reverse, sort and shift a few letters."
    else:
        base_model = f"base_model: darwin-{family.name}-base\n"
        summary = f"It knows well how to {name} a few letters, and the other skills less well."
    millions = model.num_parameters() / 1e6
    card = MODEL_CARD.format(
        family=family.name,
        kind=family.kind,
        name=name,
        base_model=base_model,
        summary=summary,
        millions=millions,
    )
    (out_dir / name / "README.md").write_text(card)


def train_family(family: Family, out_dir: Path, seed: int) -> None:
    """Train and write the base and the three specialists, each into its folder of `out_dir`."""
    tokenizer = make_tokenizer()
    watch_rng = random.Random(f"{seed} watched")
    forbidden = item_prompts()
    watched = [
        training_question({skill: 1.0}, watch_rng, forbidden)
        for skill in MEASURED_SKILLS
        for _ in range(256)
    ]
    model = family.make_model(tokenizer, seed)
    steps = train(
        model,
        tokenizer,
        family.base_mixture,
        BASE_MOST_STEPS,
        (("", BASE_LEARNING_RATE),),
        seed,
        family.training_options,
        watched=watched,
        enough=family.base_enough,
    )
    save_model(family, model, "base", out_dir)
    print(f"base: {steps} steps", flush=True)
    for position, skill in enumerate(MEASURED_SKILLS, start=1):
        # Start from the base as written, so the differences are exactly the fine-tuning.
        model = load_model("base", out_dir)
        train(
            model,
            tokenizer,
            {skill: 1.0},
            family.specialist_steps,
            family.specialist_rates,
            seed + 100 * position,
            family.training_options,
        )
        save_model(family, model, skill, out_dir)
        print(f"{skill}: {family.specialist_steps} steps", flush=True)


def main(family: Family) -> None:
    """Train the family and print its figures."""
    parser = argparse.ArgumentParser(description=f"Train the {family.name} family.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(family.threads)
    torch.use_deterministic_algorithms(True)
    train_family(family, arguments.out_dir, arguments.seed)
    print_figures(arguments.out_dir, family.uniform_weight)
