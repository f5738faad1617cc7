"""What transplanting experts costs at size: a fused mixture of experts of 8 GB, with two donors.

Father and donors have the geometry of Qwen3.5-35B-A3B with the 512 experts of the 397B, and two layers of
it, so that one layer's gate_up (2.1 GB) fills a file of its own, as it does there. They are written here
and deleted afterwards. No file is sparse: some file systems copy holes for nothing. All values are normally
distributed, but cut from one block of them at shifting places, which is as fast as the disk; the donors' are
of other blocks.

The recipe keeps a quarter of the experts, takes a quarter from each donor and blends the last quarter. `cp`
copies the father, which is the least that writing a child can cost, and waits for the disk as the merge does.
Both run in every round, one after the other, so that a busy minute of the machine hits both. A run before the
rounds is looked at for its memory.

    python -m tests.benchmarks.experts [--gigabytes 8] [--rounds 2] [--folder FOLDER]

needs room for four checkpoints. Ends with exit code 1 if a process held more than 1.5 GB of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.benchmarks.merge import SAMPLE_SECONDS, process_tree
from tests.families import write_tokenizer

EXPERTS, VOCABULARY = 512, 248_320
"""At full size: two layers of 512 experts, and embedding and head as large as one another, are 8.5 GB."""
FULL_GIGABYTES = 8
FILE_BYTES = 2.2e9
BLOCK_ELEMENTS = 32 << 20
MOST_BYTES = 1.5e9
PREFIX = "model.language_model."
DONORS = ("first", "second")

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Runs:
    """What a tool did in the rounds: bytes that it must read and write, and seconds."""

    read: float
    written: float
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    largest: float = 0.0
    """The most bytes of memory of its own that one process held."""


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="darwin-experts-", dir=arguments.folder) as temporary:
        folder = Path(temporary)
        config = _config(arguments.gigabytes / FULL_GIGABYTES)
        shapes = _shapes(config)
        size = sum(map(_bytes, shapes.values()))
        free = shutil.disk_usage(folder).free
        if free < 4.1 * size:
            sys.exit(f"{folder}: {free / 1e9:.1f} GB are free, {4.1 * size / 1e9:.1f} are needed")
        for number, name in enumerate(("father", *DONORS)):
            _write_model(folder / name, config, shapes, seed=number)
            print(f"{name}: {size / 1e9:.1f} GB", file=sys.stderr)
        runs = _measure(folder, config["text_config"]["num_experts"], shapes, arguments.rounds)
    print(_table(runs))
    if runs["darwin merge"].largest > MOST_BYTES:
        sys.exit(f"a process held more than {MOST_BYTES / 1e9} GB")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.experts")
    parser.add_argument("--gigabytes", type=float, default=FULL_GIGABYTES, help="of one checkpoint")
    parser.add_argument("--rounds", type=int, default=2, help="the best of so many counts")
    parser.add_argument("--folder", help="where to make a folder for it all; else that of TMPDIR")
    return parser.parse_args()


# -- the checkpoints -------------------------------------------------------------------------------


def _config(scale: float) -> dict[str, Any]:
    """The configuration, with so large a part of the experts and of the vocabulary."""
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "vocab_size": max(64, int(VOCABULARY * scale)),
            "hidden_size": 2048,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "num_experts": max(8, 4 * int(EXPERTS / 4 * scale)),
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
    }


def _shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the tensors as such a model has them, in the order of the published files."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen3_5MoeTextConfig(**config["text_config"])
        )
    return {
        name.replace("model.", PREFIX, 1): tuple(weight.shape)
        for name, weight in model.state_dict().items()
    }


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def _files(shapes: Shapes) -> Iterator[list[str]]:
    """The tensors in order, in files of at most `FILE_BYTES`; a large one has a file of its own."""
    part: list[str] = []
    for name, shape in shapes.items():
        if part and sum(_bytes(shapes[other]) for other in part) + _bytes(shape) > FILE_BYTES:
            yield part
            part = []
        part.append(name)
    yield part


def _write_model(target: Path, config: dict[str, Any], shapes: Shapes, seed: int) -> None:
    target.mkdir()
    # Only the upper half of an fp32 is a bf16: what is cut off rounds towards zero.
    values = np.random.default_rng(seed).standard_normal(BLOCK_ELEMENTS, np.float32) * 0.02
    block = memoryview((values.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    files = list(_files(shapes))
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write_file(target / file, {name: shapes[name] for name in names}, block)
        weight_map |= dict.fromkeys(names, file)
    total = sum(map(_bytes, shapes.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(target)


def _write_file(path: Path, shapes: Shapes, block: memoryview) -> None:
    """Stretches of the block, each from another place, so that no two pages of the file are equal."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        turn = 0
        while end:
            first = 2 * 997 * turn % (len(block) // 2)
            piece = block[first : first + min(end, len(block) // 2)]
            file.write(piece)
            end -= len(piece)
            turn += 1


# -- the runs --------------------------------------------------------------------------------------


def _recipe(folder: Path, experts: int) -> dict[str, Any]:
    """A quarter of each layer's experts each: kept, of the first donor, of the second, blended."""
    quarter = experts // 4

    def where(part: int) -> dict[str, Any]:
        return {"components": ["expert"], "experts": [part * quarter, (part + 1) * quarter - 1]}

    return {
        "parents": [{"name": n, "path": str(folder / n)} for n in ("father", *DONORS)],
        "rules": [
            *(
                {"where": where(part), "method": "passthrough", "parameters": {"source": donor}}
                for part, donor in enumerate(DONORS, 1)
            ),
            {
                "where": where(3),
                "method": "linear",
                "parameters": {"weight": {"father": 0.5, "first": 0.3, "second": 0.2}},
            },
            {"method": "passthrough", "parameters": {"source": "father"}},
        ],
    }


def _measure(folder: Path, experts: int, shapes: Shapes, rounds: int) -> dict[str, Runs]:
    recipe, child, copy = folder / "recipe.yaml", folder / "child", folder / "copy"
    recipe.write_text(yaml.safe_dump(_recipe(folder, experts)))
    size = sum(map(_bytes, shapes.values()))
    routed = sum(_bytes(shape) for name, shape in shapes.items() if ".mlp.experts." in name)
    # A blended expert is read of the father and both donors.
    runs = {"cp": Runs(size, size), "darwin merge": Runs(size + routed / 2, size)}
    merge = [sys.executable, "-m", "orchestrator.cli", "merge", str(recipe), str(child)]
    copying = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(folder / "father"), str(copy)]
    for turn in range(rounds + 1):
        for name, command, result in (("cp", copying, copy), ("darwin merge", merge, child)):
            seconds, processor, largest = _run(command, watch=turn == 0)
            if turn == 0 and name == "darwin merge":
                _check_child(child, folder, shapes, experts)
            shutil.rmtree(result)
            if turn == 0:
                runs[name].largest = largest
                continue
            runs[name].seconds.append(seconds)
            runs[name].processor.append(processor)
            print(f"round {turn}: {name} {seconds:.1f} s", file=sys.stderr)
    return runs


def _run(command: list[str], watch: bool) -> tuple[float, float, float]:
    """Seconds by the clock, of the processors, and the most own bytes of a process if it is watched."""
    os.sync()  # what the last one left to be written is not this one's
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        try:
            largest = _largest(process) if watch else 0.0
            _, status, usage = os.wait4(process.pid, 0) if not watch else (0, 0, None)
            seconds = time.monotonic() - started
        except BaseException:
            process.kill()
            raise
        process.returncode = process.returncode if watch else os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}\n{log.read().decode()[-4000:]}")
    return seconds, usage.ru_utime + usage.ru_stime if usage else 0.0, largest


def _largest(process: subprocess.Popen[bytes]) -> float:
    """The most resident bytes, but for mapped files, that one process of the tree holds until it ends."""
    largest = 0
    while process.poll() is None:
        for pid in process_tree(process.pid):
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                continue  # it has ended
            own = [int(x.split()[1]) for x in lines if x.startswith(("RssAnon:", "RssShmem:"))]
            largest = max(largest, 1024 * sum(own))
        time.sleep(SAMPLE_SECONDS)
    return float(largest)


def _check_child(child: Path, folder: Path, shapes: Shapes, experts: int) -> None:
    """The first matrix of each quarter is what the recipe asks for, read without Darwin."""
    name, shape = next((n, s) for n, s in shapes.items() if n.endswith("experts.gate_up_proj"))
    models = ("father", *DONORS)
    for part in range(4):
        expert = part * experts // 4
        father, first, second = (_matrix(folder / m, name, shape, expert) for m in models)
        blend = 0.5 * father + 0.3 * first + 0.2 * second
        found = _matrix(child, name, shape, expert)
        wanted = (father, first, second, blend)[part]
        tolerance = 0.0 if part < 3 else 2**-8
        if not np.allclose(found, wanted, rtol=tolerance, atol=0.0):
            sys.exit(f"expert {expert} of {name} is not what the recipe asks for")


def _matrix(model: Path, name: str, shape: tuple[int, ...], expert: int) -> Any:
    """One expert's matrix as float32."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    with (model / index["weight_map"][name]).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = json.loads(file.read(length))[name]["data_offsets"][0]
        file.seek(8 + length + begin + expert * _bytes(shape[1:]))
        codes = np.frombuffer(file.read(_bytes(shape[1:])), np.uint16)
    return (codes.astype(np.uint32) << 16).view(np.float32)


def _table(runs: dict[str, Runs]) -> str:
    """The best round of each, as markdown."""
    lines = [
        "| | reads GB | writes GB | wall s (every round) | CPU s | read and written GB/s | written GB/s "
        "| largest process MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in runs.items():
        wall = min(run.seconds)
        cells = [
            name,
            f"{run.read / 1e9:.1f}",
            f"{run.written / 1e9:.1f}",
            f"**{wall:.1f}** ({', '.join(f'{seconds:.1f}' for seconds in run.seconds)})",
            f"{min(run.processor):.1f}",
            f"{(run.read + run.written) / wall / 1e9:.2f}",
            f"{run.written / wall / 1e9:.2f}",
            f"{run.largest / 1e6:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
