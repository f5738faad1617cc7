"""What the models of a family on the strings know: exact match on the items, as a table."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from workers.families.strings.skills import MEASURED_SKILLS, all_items

Questions = list[tuple[str, str]]  # prompts with their answers


def load_model(name: str, out_dir: Path) -> PreTrainedModel:
    """Return a written model as float32."""
    return AutoModelForCausalLM.from_pretrained(out_dir / name, dtype=torch.float32)


@torch.no_grad()
def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Questions
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


def uniform_merge(out_dir: Path, weight: float) -> PreTrainedModel:
    """Return the base plus `weight` times the sum of the specialists' differences."""
    merged = load_model("base", out_dir)
    base = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    for skill in MEASURED_SKILLS:
        specialist = load_model(skill, out_dir).state_dict()
        for name, tensor in merged.state_dict().items():
            # The tied embedding appears under two names; adding to it twice would double it.
            if name != "lm_head.weight":
                tensor += weight * (specialist[name] - base[name])
    return merged


def print_figures(out_dir: Path, weight: float) -> None:
    """Print the held-out exact match of every written model, and of their uniform merge."""
    tokenizer = AutoTokenizer.from_pretrained(out_dir / "base")
    items = all_items()
    candidates = {name: load_model(name, out_dir) for name in ("base", *MEASURED_SKILLS)}
    candidates["uniform merge"] = uniform_merge(out_dir, weight)
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
