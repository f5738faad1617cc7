"""What a card, a report and a terminal say of the evidence, from a lineage's data: the same everywhere.

Lineages of earlier versions lack parts of it; of those nothing is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.contamination import CALLED, CONTAMINATION_FILE, NEAR, warnings_about
from orchestrator.judgement import SIGNIFICANCE, peeking_factor
from orchestrator.objectives import scalar_name
from orchestrator.statistics import WARN_SHARE, format_p_value

MEANINGS = {
    "truncated": "Answers were cut off at the token limit (a larger max_new_tokens helps)",
    "unparsed": "Answers hold nothing that could be read as one, and count as wrong",
}


@dataclass(frozen=True)
class CategoryTable:
    """The scores of one task, category by category, for some models."""

    task: str
    models: list[str]
    rows: list[tuple[str, list[dict[str, Any]]]]
    """Category, and the score of each model."""


def warnings_of(lineage: dict[str, Any]) -> list[str]:
    """What makes the held-out results less than they seem, in sentences."""
    found = []
    for key, meaning in MEANINGS.items():
        told = [
            f"{model} on {task} {score[key]} of {score['n']} ({score[key] / score['n']:.1%})"
            for model, tasks in lineage["holdout"].items()
            for task, score in tasks.items()
            if score[key] > WARN_SHARE * score["n"]
        ]
        if told:
            found.append(f"{meaning}: {', '.join(told)}")
    return found + (warnings_about(lineage["contamination"]) if "contamination" in lineage else [])


# -- claims ----------------------------------------------------------------------------------


def tests_note(lineage: dict[str, Any]) -> str:
    """Which test compares the child with a parent."""
    comparisons = lineage["comparisons"]
    names = [
        name
        for key, name in (("mcnemar", "exact McNemar test"), ("sign flip", "paired sign-flip test"))
        if any(comparison.get("test", "mcnemar") == key for comparison in comparisons)
    ]
    interval = (
        " Brackets hold 95 % intervals of the difference (paired bootstrap)."
        if any("difference" in comparison for comparison in comparisons)
        else ""
    )
    return (
        f"Two-sided p of the {' or, for points between 0 and 1, '.join(names)} on the same items, each "
        f"for itself; `all` pools the tasks.{interval}"
    )


def comparison_rows(lineage: dict[str, Any]) -> list[list[str]]:
    """Child against each parent, task by task; a head first."""
    comparisons = lineage["comparisons"]
    fractions = any(comparison.get("test") == "sign flip" for comparison in comparisons)
    heads = (
        ("child better", "parent better")
        if fractions
        else ("only child right", "only parent right")
    )
    with_difference = all("difference" in comparison for comparison in comparisons)
    rows = [["parent", "task", *heads, "p", *(["difference"] if with_difference else [])]]
    for c in comparisons:
        row = [
            c["parent"],
            c["task"],
            str(c["child_only"]),
            str(c["parent_only"]),
            format_p_value(c["p_value"]),
        ]
        rows.append([*row, *([_difference(c["difference"])] if with_difference else [])])
    return rows


def better_of(comparison: dict[str, Any]) -> str:
    """Who is better by this comparison alone: child, parent, or neither."""
    if comparison["p_value"] >= SIGNIFICANCE:
        return "neither"
    gain = comparison["child_only"] - comparison["parent_only"]
    if "difference" in comparison:
        gain = comparison["difference"]["mean"]
    return "child" if gain > 0 else "parent"


def claim_rows(lineage: dict[str, Any]) -> list[list[str]]:
    """What speaks for the claim to beat each parent; a head first. Empty for older lineages."""
    if "claims" not in lineage:
        return []
    kind = scalar_name(lineage["search"]["objective"])
    rows = [
        [
            "parent",
            f"difference ({kind} of tasks)",
            "p, all items",
            f"p, {kind} of tasks",
            "p, adjusted",
            "beaten",
        ]
    ]
    for claim in lineage["claims"]:
        name = claim["parent"]
        gap = lineage["holdout_fitness"]["child"] - lineage["holdout_fitness"][name]
        rows.append(
            [
                name,
                _difference(claim["difference"]) if claim["difference"] else f"{gap:+.3f}",
                *(format_p_value(claim[key]) for key in ("p_items", "p_objective", "p_adjusted")),
                "yes" if name in lineage["beaten"] else "no",
            ]
        )
    return rows


def claims_note(lineage: dict[str, Any]) -> str:
    """How the claims are kept honest; empty for older lineages."""
    if "claims" not in lineage:
        return ""
    parents, judged = len(lineage["claims"]), lineage["judged"]
    aim = scalar_name(lineage["search"]["objective"])
    adjusted = [f"for {parents} parents (Holm)"] if parents > 1 else []
    if judged > 1:
        adjusted.append(
            f"times {peeking_factor(judged):g}, because these items have judged {judged} children of this "
            "campaign"
        )
    how = f", adjusted {' and '.join(adjusted)}" if adjusted else ""
    return (
        "A parent counts as beaten if the child has significantly more right answers over all items and a "
        f"significantly higher {aim} of the tasks' scores: the larger p{how}, "
        f"is below {SIGNIFICANCE:g}. Of campaigns whose children beat nobody, at most 5 % make any such "
        "claim, however many parents they have and however often they go on and judge again."
    )


# -- winner's curse --------------------------------------------------------------------------


def shrinkage_rows(lineage: dict[str, Any]) -> list[list[str]]:
    """Search beside held-out scores of child and parents; a head first. Empty for older lineages."""
    if "winners_curse" not in lineage:
        return []
    tasks = list(lineage["tasks"])
    kind = scalar_name(lineage["search"]["objective"])
    rows = [["model", *tasks, f"{kind} of tasks"]]
    for name, model in lineage["winners_curse"]["models"].items():
        if model["shrinkage"] is None:
            continue
        cells = [
            f"{model['search']['tasks'][task]:.3f} to {model['holdout']['tasks'][task]:.3f}"
            for task in tasks
        ]
        search, held_out = model["search"]["objective"], model["holdout"]["objective"]
        rows.append([name, *cells, f"{search:.3f} to {held_out:.3f} ({held_out - search:+.3f})"])
    return rows


def shrinkage_note(lineage: dict[str, Any]) -> str:
    """The winner's curse of the child, in words; empty for older lineages."""
    curse = lineage.get("winners_curse")
    if curse is None or curse["models"]["child"]["shrinkage"] is None:
        return ""
    how = (
        "The estimate chooses again on search items that are drawn with replacement, and scores on those "
        f"left out ({curse['resamples']} draws; Tsamardinos et al. 2018). "
    )
    return (
        f"{shrinkage_words(curse)} {how if _is_expected(curse) else ''}"
        "Parents were not chosen by the search items: what they lose or gain is chance, or tells how "
        "much harder or easier the held-out items are."
    )


def shrinkage_words(curse: dict[str, Any]) -> str:
    """How much less the child scores on items that did not choose it, and how much that was to expect."""
    child = curse["models"]["child"]
    lost, count = child["shrinkage"]["objective"], curse["candidates"]
    direction = f"{abs(lost):.3f} {'less' if lost >= 0 else 'more'}"
    if _is_expected(curse):
        expected = (
            f"{curse['expected']:.3f} less was to be expected of the best of {count} candidates that "
            "answered every search item."
        )
    elif count > 1:
        expected = "With a single search item in a task, what to expect is not known."
    else:
        expected = "No other candidate answered every search item, so what to expect is not known."
    return (
        f"The child has {child['search']['objective']:.3f} on the search items, which chose it, and "
        f"{child['holdout']['objective']:.3f} on the held-out items: {direction}. {expected}"
    )


def _is_expected(curse: dict[str, Any]) -> bool:
    """Whether there is an estimate of what was to be expected."""
    return curse["candidates"] > 1 and curse["expected"] is not None


# -- categories and contamination ------------------------------------------------------------


def category_tables(lineage: dict[str, Any], models: list[str]) -> list[CategoryTable]:
    """One table for each task that has categories."""
    return [
        CategoryTable(
            task,
            models,
            [(category, [scores[name] for name in models]) for category, scores in parts.items()],
        )
        for task, parts in lineage.get("categories", {}).items()
    ]


def overlap_rows(lineage: dict[str, Any]) -> list[list[str]]:
    """What the sets of items have in common; a head first. Empty for older lineages."""
    if "contamination" not in lineage:
        return []
    return [
        ["of", "found in", "texts", "near duplicates", "share any n-gram"],
        *(
            [CALLED[overlap["of"]], CALLED[overlap["in"]]]
            + [str(overlap[key]) for key in ("texts", "near", "touched")]
            for overlap in lineage["contamination"]["overlaps"]
        ),
    ]


def overlap_note(lineage: dict[str, Any]) -> str:
    """How the overlap was found, in words; empty for older lineages."""
    if "contamination" not in lineage:
        return ""
    method = lineage["contamination"]["method"]
    return (
        f"By n-grams of {method['words']} words, or {method['letters']} letters where words are not divided "
        f"by spaces; a near duplicate has {NEAR:.0%} or more of them there. The worst are in "
        f"{CONTAMINATION_FILE}. Whether a parent was trained on any of these items is not known here."
    )


def _difference(difference: dict[str, float]) -> str:
    return f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
