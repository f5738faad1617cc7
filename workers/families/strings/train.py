"""Train the strings family: a base model that half knows each skill, and one specialist per skill.

The family is small on purpose: a demo and tests can merge and score it on a CPU within seconds.
The recipe is what makes merging worth while. The base half knows every skill, and each specialist
is a short, gentle fine-tuning of that base, so the specialists stay close enough to be merged; a
weaker base or a harder fine-tuning yields specialists whose merges know nothing.

No prompt of the item files is ever trained on: `training_question` rejects them.

Run `python -m workers.families.strings.train OUT_DIR [--seed 0]`. With one seed, one machine and
one thread count the checkpoints are the same every time. The table printed at the end is measured
on the checkpoints as written.
"""

import argparse
import math
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from workers.families.strings.skills import (
    ALPHABET,
    LONGEST,
    MEASURED_SKILLS,
    SKILLS,
    all_items,
    item_prompts,
    random_question,
)

PAD, START, END, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
IGNORED_LABEL = -100
CONTEXT_TOKENS = 64

BATCH_SIZE = 128
WARM_UP_STEPS = 20
BASE_MIXTURE = {"copy": 0.20, "reverse": 0.45, "sort": 0.20, "shift": 0.15}
BASE_MOST_STEPS = 400
BASE_LEARNING_RATE = 2e-3
# The base is done as soon as its mean exact match on the measured skills is this high.
BASE_ENOUGH = 0.75
SPECIALIST_STEPS = 160
SPECIALIST_LEARNING_RATE = 2e-4
UNIFORM_WEIGHT = 0.4

Questions = list[tuple[str, str]]  # prompts with their answers


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


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return the untrained float32 model, its parameters drawn from the seed."""
    torch.manual_seed(seed)
    special_ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **special_ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=LONGEST + 1, **special_ids
    )
    return model


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


@torch.no_grad()
def exact_match(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Questions
) -> float:
    """Return the share of questions, 0 to 1, that greedy generation answers exactly."""
    model.eval()
    batch = tokenizer([prompt for prompt, _ in questions], padding=True, return_tensors="pt")
    generated = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    new_tokens = generated[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    answers = [answer for _, answer in questions]
    right: int = sum(text == answer for text, answer in zip(texts, answers, strict=True))
    return right / len(questions)


def train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    mixture: Mapping[str, float],
    steps: int,
    learning_rate: float,
    seed: int,
    watched: Questions | None = None,
    enough: float = 1.0,
) -> int:
    """Train the model in place on fresh questions; return the steps taken.

    The learning rate rises over the first steps and then falls by a half cosine to a tenth.
    Training stops early once the exact match on the watched questions reaches `enough`.
    """
    forbidden = item_prompts() | {prompt for prompt, _ in watched or []}
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    for step in range(1, steps + 1):
        rise = min(1.0, step / WARM_UP_STEPS)
        fall = 0.55 + 0.45 * math.cos(math.pi * (step - 1) / steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rise * fall
        model.train()
        questions = [training_question(mixture, rng, forbidden) for _ in range(BATCH_SIZE)]
        loss = model(**encode_batch(tokenizer, questions)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if watched and step % 10 == 0 and exact_match(model, tokenizer, watched) >= enough:
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

# darwin-strings-{name}

{summary}

A Qwen3 model of {millions:.2f} million parameters with one token per character: one of the four
models of Darwin's strings family.
"""


def save_model(model: Qwen3ForCausalLM, name: str, out_dir: Path) -> None:
    """Write the model as bfloat16 with its tokenizer and its card; round the model in place."""
    model.to(torch.bfloat16).save_pretrained(out_dir / name)
    (out_dir / name / "model.safetensors").chmod(0o644)  # it is written for its owner only
    # A used tokenizer would be written with the padding of its last batch.
    make_tokenizer().save_pretrained(out_dir / name)
    if name == "base":
        base_model, summary = "", "It half knows how to reverse, sort and shift a few letters."
    else:
        base_model = "base_model: darwin-strings-base\n"
        summary = f"It knows well how to {name} a few letters, and the other skills less well."
    millions = model.num_parameters() / 1e6
    card = MODEL_CARD.format(name=name, base_model=base_model, summary=summary, millions=millions)
    (out_dir / name / "README.md").write_text(card)


def load_model(name: str, out_dir: Path) -> Qwen3ForCausalLM:
    """Return a written model as float32."""
    return AutoModelForCausalLM.from_pretrained(out_dir / name, dtype=torch.float32)


def train_family(out_dir: Path, seed: int) -> None:
    """Train and write the base and the three specialists, each into its folder of `out_dir`."""
    tokenizer = make_tokenizer()
    watch_rng = random.Random(f"{seed} watched")
    forbidden = item_prompts()
    watched = [
        training_question({skill: 1.0}, watch_rng, forbidden)
        for skill in MEASURED_SKILLS
        for _ in range(256)
    ]
    model = make_model(tokenizer, seed)
    steps = train(
        model,
        tokenizer,
        BASE_MIXTURE,
        BASE_MOST_STEPS,
        BASE_LEARNING_RATE,
        seed,
        watched=watched,
        enough=BASE_ENOUGH,
    )
    save_model(model, "base", out_dir)
    print(f"base: {steps} steps", flush=True)
    for position, skill in enumerate(MEASURED_SKILLS, start=1):
        # Start from the base as written, so the differences are exactly the fine-tuning.
        model = load_model("base", out_dir)
        train(
            model,
            tokenizer,
            {skill: 1.0},
            SPECIALIST_STEPS,
            SPECIALIST_LEARNING_RATE,
            seed + 100 * position,
        )
        save_model(model, skill, out_dir)
        print(f"{skill}: {SPECIALIST_STEPS} steps", flush=True)


def uniform_merge(out_dir: Path) -> Qwen3ForCausalLM:
    """Return the base plus `UNIFORM_WEIGHT` times the sum of the specialists' differences."""
    merged = load_model("base", out_dir)
    base = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    for skill in MEASURED_SKILLS:
        specialist = load_model(skill, out_dir).state_dict()
        for name, tensor in merged.state_dict().items():
            # The tied embedding appears under two names; adding to it twice would double it.
            if name != "lm_head.weight":
                tensor += UNIFORM_WEIGHT * (specialist[name] - base[name])
    return merged


def print_figures(out_dir: Path) -> None:
    """Print the held-out exact match of every written model, and of their uniform merge."""
    tokenizer = AutoTokenizer.from_pretrained(out_dir / "base")
    items = all_items()
    candidates = {name: load_model(name, out_dir) for name in ("base", *MEASURED_SKILLS)}
    candidates["uniform merge"] = uniform_merge(out_dir)
    print("| model | " + " | ".join(MEASURED_SKILLS) + " | worst |")
    print("|---|" + "---|" * (len(MEASURED_SKILLS) + 1))
    for name, model in candidates.items():
        figures = [
            exact_match(
                model,
                tokenizer,
                [(item["prompt"], item["answer"]) for item in items[f"{skill}.holdout.jsonl"]],
            )
            for skill in MEASURED_SKILLS
        ]
        print(f"| {name} | " + " | ".join(f"{f:.3f}" for f in [*figures, min(figures)]) + " |")


def main() -> None:
    """Train the family and print its figures."""
    parser = argparse.ArgumentParser(description="Train the strings family.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # The order of floating-point sums, hence every bit of the weights, depends on the threads.
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    train_family(arguments.out_dir, arguments.seed)
    print_figures(arguments.out_dir)


if __name__ == "__main__":
    main()
