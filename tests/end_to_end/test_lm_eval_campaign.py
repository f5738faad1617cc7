"""A campaign whose fitness is a task of lm-eval: built by the driver, and again by real workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.campaigns import records, run_darwin, scored_items, write_campaign
from tests.lm_eval_tasks import load, write_tasks
from workers.storage import open_store

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")


def test_a_task_of_lm_eval_steers_and_judges(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    source = {"lm_eval": "skills", "include_path": str(folder)}
    (tmp_path / "skills.yaml").write_text(
        yaml.safe_dump({"kind": "lm_eval", "source": source, "metric": "acc"})
    )
    file = write_campaign(
        tmp_path,
        tasks=[{"name": str(tmp_path / "skills.yaml"), "search_items": 12, "holdout_items": 20}],
        search={"optimizer": "cma_es", "evaluations": 4, "population": 4},
    )
    result = run_darwin("run", str(file))
    assert result["status"] == "done"
    task = load(folder, "skills", {"search": 12, "holdout": 20}, metric="acc")
    scored = scored_items(records(open_store(result["campaign"])))
    for split in ("search", "holdout"):
        asked = {item for _, of, _, item in scored if of == split}
        assert asked == {item.id for item in task.items[split]}
    assert len(set(scored)) == len(scored)
    assert {"choose", "complete"} == {item.split("/")[0] for _, _, _, item in scored}
    assert (
        result["holdout"]["reverse"]["skills"]["score"]
        > result["holdout"]["sort"]["skills"]["score"]
    )
