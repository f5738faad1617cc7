"""Examples before a question (few-shot): the first rows of a split, of the same category, or fixed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workers.evaluation.answers import LETTERS
from workers.evaluation.keys import Keys, is_text
from workers.evaluation.tasks.shapes import Candidate, Shape
from workers.evaluation.tasks.templates import Template

KEYS = ("split", "count", "same_category", "examples", "template", "separator")


class Examples:
    """What a task file says under `few_shot`.

    Its template sees what the prompt's does, and `answer`, and `letter` where there are choices; these are
    in the source's order. The texts follow each other, each with the separator behind it.
    """

    def __init__(self, shape: Shape, section: Keys) -> None:
        self.section = section
        self._shape = shape
        self._template = Template(
            section.text("template"), f"task {section.task}: few_shot.template"
        )
        self._separator = section.data.get("separator", "\n\n")
        if not is_text(self._separator):
            section.refuse("separator", f"must be a text, not {self._separator!r:.80}")
        self._by_category = section.flag("same_category")
        if ("examples" in section) == ("split" in section):
            section.refuse("split", "or examples: one of the two must say where examples come from")
        if "shots" not in shape.prompt.names:
            section.refuse("template", "is of no use: the prompt has no {{ shots }}")
        self.split = section.text("split") if "split" in section else None
        self._count = section.whole("count") if self.split else 0

    def choose(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those of the split's rows that are examples: the first ones, of each category if they are to be
        of the same."""
        if self.split is None:
            given = self.section.value("examples")
            if not isinstance(given, list) or not given:
                self.section.refuse("examples", "must be a list of examples")
            place = "few_shot.examples"
            return [self._fixed(f"{place} {n}", row) for n, row in enumerate(given, 1)]
        counted: dict[str, int] = {}
        chosen = []
        for candidate in candidates:
            group = candidate.category if self._by_category else ""
            counted[group] = counted.get(group, 0) + 1
            if counted[group] <= self._count:
                chosen.append(candidate)
        return chosen

    def _fixed(self, place: str, values: Any) -> Candidate:
        """An example that the task file gives, with its fields by name."""
        if not isinstance(values, dict):
            self.section.refuse("examples", f"must be fields and their values: {place}")
        if values.get("choices") is not None:
            self._shape.check_choices(place, values["choices"])
        choices, answer = tuple(values.get("choices") or ()), values.get("answer", "")
        if choices and type(answer) is int and not 0 <= answer < len(choices):
            self.section.refuse(
                "examples", f"must number choices from 0: {place} has the answer {answer}"
            )
        question = self._shape.question(values, choices)
        category = str(values.get("category", ""))
        return Candidate("", place, values, choices, answer, category, question)

    def texts(self, chosen: Sequence[Candidate], categories: set[str]) -> dict[str, str]:
        """Category -> the text of the examples before a question of it; "" for any, if they are the same."""
        groups = categories if self._by_category else {""}
        found: dict[str, str] = {}
        for group in sorted(groups):
            own = [c for c in chosen if not self._by_category or c.category == group]
            if not own:
                self.section.refuse(
                    "same_category", f"is true, but there is no example of category {group!r}"
                )
            if len(own) < self._count:
                self.section.refuse(
                    "count", f"is {self._count}, but {self.split} has {len(own)} examples "
                             f"{f'of category {group!r}' if group else 'in all'}")  # fmt: skip
            found[group] = "".join(self._render(c) + self._separator for c in own)
        return found

    def before(self, texts: dict[str, str], candidate: Candidate) -> str:
        """The examples' text for one question."""
        return texts[candidate.category if self._by_category else ""]

    def _render(self, candidate: Candidate) -> str:
        shown = self._shape.shown(candidate, candidate.choices) | {"answer": candidate.answer}
        if candidate.choices and type(candidate.answer) is int:
            shown["letter"] = LETTERS[candidate.answer]
        return self._template.render(shown, candidate.place)
