"""Calibration sets: what ships, and one's own files, line by line."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from orchestrator.config import SHIPPED
from orchestrator.mri.probe import SHIPPED_SETS, load_calibration_sets
from workers.diagnostics.calibration import read_calibration_set
from workers.errors import BadInputError

GOOD = {"id": "one", "conditioned": "2 + 2 =", "generic": "a or b ="}


def write(folder: Path, *lines: str) -> Path:
    file = folder / "own.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_the_named_sets_ship() -> None:
    sets = load_calibration_sets()
    assert [calibration.name for calibration in sets] == list(SHIPPED_SETS)
    for calibration in sets:
        content = (SHIPPED / "calibration" / f"{calibration.name}.jsonl").read_bytes()
        assert calibration.sha256 == hashlib.sha256(content).hexdigest()
        assert calibration.summary == {
            "prompts": len(content.splitlines()),
            "sha256": calibration.sha256,
        }
        assert 8 <= len(calibration.pairs) <= 12
    ids = [pair.id for calibration in sets for pair in calibration.pairs]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", SHIPPED_SETS)
def test_pairs_that_ship_match_but_for_what_they_ask(name: str) -> None:
    """The last tokens are compared: they must be the same word. So are means: lengths must be alike."""
    (calibration,) = load_calibration_sets([name])
    for pair in calibration.pairs:
        one, two = pair.conditioned.split(), pair.generic.split()
        assert pair.conditioned != pair.generic
        if name == "korean":
            assert pair.conditioned[-1] == pair.generic[-1] == ":"
            assert any("HANGUL" in unicodedata.name(letter, "") for letter in pair.conditioned)
            assert pair.generic.isascii()
        else:
            assert one[-1] == two[-1], pair.id
            assert 0.75 < len(pair.generic) / len(pair.conditioned) < 1.33, pair.id


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({"id": "two", "conditioned": "x"}), "the key 'generic' is missing"),
        (json.dumps(GOOD | {"id": "two", "generic": " "}), "generic must be a text"),
        (json.dumps(GOOD | {"id": 2}), "id must be a text"),
        (json.dumps(GOOD | {"id": "two", "weight": 1}), "unknown key 'weight'"),
        (json.dumps(GOOD), "'one' is that of line 1 too"),
    ],
)
def test_a_bad_line_is_named(line: str, problem: str, tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps(GOOD), "", line)
    with pytest.raises(BadInputError, match=problem) as caught:
        read_calibration_set(file)
    assert str(caught.value).startswith(f"{file}, line 3: ")


def test_a_file_that_is_no_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no prompts in it"):
        read_calibration_set(write(tmp_path, "", ""))
    (tmp_path / "own.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInputError, match=r"own\.jsonl: not readable as UTF-8"):
        read_calibration_set(tmp_path / "own.jsonl")


def test_own_files_and_names_go_together(tmp_path: Path) -> None:
    file = write(tmp_path, json.dumps(GOOD, ensure_ascii=False))
    own, shipped = load_calibration_sets([str(file), "math"])
    assert (own.name, own.pairs[0].generic, shipped.name) == ("own", GOOD["generic"], "math")
    assert load_calibration_sets([f"file://{tmp_path}/own.jsonl"]) == (own,)


def test_sets_that_are_not_there_or_not_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no calibration that ships \(code, .*\.jsonl file"):
        load_calibration_sets(["poetry"])
    with pytest.raises(BadInputError, match="there is no file"):
        load_calibration_sets([str(tmp_path / "none.jsonl")])
    with pytest.raises(BadInputError, match="not all named differently"):
        load_calibration_sets(["math", "math"])


def test_the_set_of_the_documentation_is_one(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "diagnostics.md"
    (text,) = re.findall(r"```jsonl\n(.*?)```", page.read_text(), re.DOTALL)
    calibration = read_calibration_set(write(tmp_path, text))
    assert [pair.id for pair in calibration.pairs] == ["sum-1", "sum-2"]


def test_sets_are_read_without_torch() -> None:
    code = (
        "import sys; from orchestrator.mri.probe import load_calibration_sets; "
        "load_calibration_sets(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
