"""The skills of the strings family, and the items that measure them.

A skill rewrites a short string of letters. An item asks for one such rewriting: its prompt is the
tag of the skill, the letters and `=`; its answer is the rewritten letters. Every item is checkable
by plain Python, so a merge can be scored without a judge.

Items come from fixed seeds and no prompt occurs twice, so the search items, the held-out items and
(because training rejects both, see `train.py`) the training data never share a prompt.

Write the item files with `python -m workers.families.strings.skills OUT_DIR`.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ALPHABET = "abcdefghijkl"
SHORTEST = 5
LONGEST = 8


def copy(letters: str) -> str:
    """Return the letters unchanged."""
    return letters


def reverse(letters: str) -> str:
    """Return the letters from last to first."""
    return letters[::-1]


def sort(letters: str) -> str:
    """Return the letters in alphabetical order."""
    return "".join(sorted(letters))


def shift(letters: str) -> str:
    """Return each letter's successor in the alphabet; the last letter's successor is the first."""
    return "".join(ALPHABET[(ALPHABET.index(letter) + 1) % len(ALPHABET)] for letter in letters)


@dataclass(frozen=True)
class Skill:
    """A rewriting of letters, and the one letter that asks for it at the start of a prompt."""

    tag: str
    rewrite: Callable[[str], str]


SKILLS = {
    "copy": Skill("C", copy),
    "reverse": Skill("R", reverse),
    "sort": Skill("S", sort),
    "shift": Skill("U", shift),  # "up" by one letter, since S is taken
}

# The skills that have item files and a specialist. Copying only helps the base model to learn.
MEASURED_SKILLS = ("reverse", "sort", "shift")


@dataclass(frozen=True)
class Split:
    """A kind of item file: how many items it has, and the seed of its first measured skill."""

    count: int
    first_seed: int


SPLITS = {"search": Split(128, 1000), "holdout": Split(512, 2000)}


def random_question(skill_name: str, rng: random.Random) -> tuple[str, str]:
    """Draw 5 to 8 letters uniformly; return the prompt (such as `Rabcde=`) and its answer."""
    skill = SKILLS[skill_name]
    letters = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(SHORTEST, LONGEST)))
    return f"{skill.tag}{letters}=", skill.rewrite(letters)


def all_items() -> dict[str, list[dict[str, str]]]:
    """Generate every item: file name (such as `reverse.search.jsonl`) to items in file order."""
    taken: set[str] = set()
    files = {}
    for split_name, split in SPLITS.items():
        for position, skill_name in enumerate(MEASURED_SKILLS):
            rng = random.Random(split.first_seed + position)
            items: list[dict[str, str]] = []
            while len(items) < split.count:
                prompt, answer = random_question(skill_name, rng)
                if prompt in taken:
                    continue
                taken.add(prompt)
                identity = f"{skill_name}-{split_name}-{len(items) + 1:04d}"
                items.append({"id": identity, "prompt": prompt, "answer": answer})
            files[f"{skill_name}.{split_name}.jsonl"] = items
    return files


def item_prompts() -> set[str]:
    """Return every prompt of every item file: what training must never see."""
    return {item["prompt"] for items in all_items().values() for item in items}


def write_items(out_dir: Path) -> None:
    """Write one JSON Lines file per measured skill and split into `out_dir`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for file_name, items in all_items().items():
        text = "".join(json.dumps(item) + "\n" for item in items)
        (out_dir / file_name).write_bytes(text.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the item files of the strings family.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    write_items(parser.parse_args().out_dir)
