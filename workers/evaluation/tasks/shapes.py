"""How rows of a source become items: fields, prompt, examples, choices and their order."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from workers.errors import BadInputError
from workers.evaluation.answers import LETTERS
from workers.evaluation.engine import Chat, Prompt
from workers.evaluation.keys import Keys, is_text
from workers.evaluation.task import Item
from workers.evaluation.tasks.rows import Row
from workers.evaluation.tasks.templates import Expression, Template

OWN_FIELDS = ("id", "answer", "choices", "category")
"""Fields with a meaning of their own. All others are for the templates."""

DEFAULT_CONTINUATION = " {{ choice }}"


@dataclass(frozen=True)
class Candidate:
    """A row of a source, read: what may become an item, or an example."""

    id: str
    place: str
    values: dict[str, Any]
    choices: tuple[str, ...]
    """In the source's order."""
    answer: str | int
    category: str
    question: str
    """See `Item.question`."""


class Shape:
    """What a task file says about rows and prompts."""

    def __init__(self, task: str, top: Keys) -> None:
        self.task = task
        self.kind = str(top.data["kind"])
        self.fields: dict[str, Expression] | None = None
        if "fields" in top:
            fields = top.section("fields", top.data["fields"] or [])
            self.fields = {
                name: Expression(fields.text(name), f"task {task}: fields.{name}")
                for name in fields.data
            }
        self.prompt = Template(top.text("prompt"), f"task {task}: prompt")
        self.continuation = Template(
            top.text("continuation", DEFAULT_CONTINUATION), f"task {task}: continuation"
        )
        for key, template in (("prompt", self.prompt), ("continuation", self.continuation)):
            if "answer" in template.names:
                top.refuse(
                    key, "shows {{ answer }}, which only few_shot.template may: it is the right one"
                )
        self.seed = top.whole("shuffle_choices", least=0) if "shuffle_choices" in top else None
        self.makes_chat, self.system = top.flag("chat"), top.text("system", "")

    def read(self, place: str, row: Row) -> Candidate:
        """Take a row's fields. Raises `BadInputError` naming the task and the place."""
        if not isinstance(row, dict):
            self._refuse(place, f"not a row with columns: {row!r:.80}")
        seen = {**row, "row": row}
        if self.fields is None:
            values = dict(row)
        else:
            values = {name: take(seen, place) for name, take in self.fields.items()}
        choices = values.get("choices")
        if choices is not None:
            self.check_choices(place, choices)
        elif self.kind == "multiple_choice":
            self._refuse(place, "has no field choices")
        texts = tuple(choices or ())
        question = self.question(values, texts)
        if not question:
            named = sorted(self.prompt.names - set(OWN_FIELDS))
            self._refuse(
                place,
                f"the prompt shows nothing of it: it names {', '.join(named) or 'no field'}, and there are "
                f"{', '.join(map(str, values))}",
            )
        identifier = values.get("id")
        if identifier is None:
            identifier = hashlib.sha256(question.encode()).hexdigest()[:16]
        if type(identifier) is int:
            identifier = str(identifier)
        category = values.get("category", "")
        for name, value in (("id", identifier), ("category", category)):
            if not is_text(value):
                self._refuse(place, f"its {name} {value!r:.80} is no text")
        answer = self._checked_answer(place, values.get("answer"), texts)
        return Candidate(identifier, place, values, texts, answer, category, question)

    def check_choices(self, place: str, choices: Any) -> None:
        """Raise `BadInputError` naming the place for what cannot be the choices of a question."""
        if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(LETTERS):
            self._refuse(place, f"choices must be 2 to {len(LETTERS)} texts, not {choices!r:.80}")
        for choice in choices:
            if not is_text(choice) or not choice.strip():
                self._refuse(place, f"the choice {choice!r:.80} is no text, or empty")

    def _checked_answer(self, place: str, answer: Any, choices: tuple[str, ...]) -> str | int:
        if choices:
            if type(answer) is not int or not 0 <= answer < len(choices):
                self._refuse(
                    place, f"answer must be the number of a choice, from 0: {answer!r:.80}"
                )
            return answer
        if type(answer) in (int, float):
            answer = str(answer)
        if not is_text(answer) or not answer.strip():
            self._refuse(place, f"answer must be a text that is not blank, not {answer!r:.80}")
        return str(answer)

    def question(self, values: dict[str, Any], choices: Sequence[str]) -> str:
        """See `Item.question`: the fields that the prompt shows, and the choices in alphabetic order."""
        shown = (name for name in values if name in self.prompt.names and name not in OWN_FIELDS)
        texts = (values[name] for name in shown)
        parts = [t if isinstance(t, str) else json.dumps(t, default=str) for t in texts if t]
        return " ".join(" ".join([*parts, *sorted(choices)]).split())

    def item(self, candidate: Candidate, shots: str | None) -> Item:
        """The finished item; `shots` are the examples before it, if the task has them."""
        order = list(range(len(candidate.choices)))
        if self.seed is not None:
            random.Random(f"{self.seed}:{candidate.id}").shuffle(order)
        choices = tuple(candidate.choices[number] for number in order)
        answer = candidate.answer
        if choices:
            answer = order.index(int(answer))
        shown = self.shown(candidate, choices)
        examples = {} if shots is None else {"shots": shots}
        prompt = self.ask(self.prompt.render({**shown, **examples}, candidate.place))
        data = ""
        if self.kind == "multiple_choice":
            choices = tuple(
                self.continuation.render(
                    {**shown, "choice": choice, "letter": letter}, candidate.place
                )
                for choice, letter in zip(choices, shown["letters"], strict=True)
            )
            self.check_choices(candidate.place, choices)
        elif choices:
            answer = LETTERS[int(answer)]
            needed = self.prompt.names & candidate.values.keys() - {"choices"}
            data = json.dumps(
                {name: candidate.values[name] for name in sorted(needed)}, default=str
            )
        permutation = tuple(order) if self.seed is not None else ()
        return Item(
            candidate.id, prompt, answer, choices, candidate.category, candidate.question,
            permutation, data,
        )  # fmt: skip

    def shown(self, candidate: Candidate, choices: Sequence[str]) -> dict[str, Any]:
        """What templates see: all fields, the choices in the order in which they are shown, and `letters`."""
        return {**candidate.values, "choices": list(choices), "letters": LETTERS[: len(choices)]}

    def ask(self, prompt: str) -> Prompt:
        return Chat(prompt, self.system) if self.makes_chat else prompt

    def _refuse(self, place: str, problem: str) -> NoReturn:
        raise BadInputError(f"task {self.task}: {place}: {problem}")
