"""Merging: recipes, plans, methods, and the executor that streams a plan into a sink.

A `Recipe` says which method and parameters each tensor gets. `executor.Merger` holds the opened parents
and runs recipes into a sink (`sinks`): a live model, a checkpoint, or hashes alone. Every method is one
file in `methods/`; arithmetic is fp32, stored in the father's dtype, and the bytes do not depend on
chunking, threads or workers.

Recipes and the methods' declarations import without torch, so that a configuration can be checked
where torch is not needed; `executor` and `sinks` are imported where they run.
"""

from workers.merging.methods import METHODS, MergeMethod, get_method
from workers.merging.recipe import (
    CARRIED,
    ParentReference,
    PostStep,
    Recipe,
    Rule,
    passthrough_recipe,
)
from workers.merging.selector import Selector, parse_selector

__all__ = [
    "CARRIED",
    "METHODS",
    "MergeMethod",
    "ParentReference",
    "PostStep",
    "Recipe",
    "Rule",
    "Selector",
    "get_method",
    "parse_selector",
    "passthrough_recipe",
]
