"""Run by mergekit's own Python: how mergekit would merge each tensor of some configurations.

The argument is a JSON list of configuration files; prints a JSON list with, for each, null if mergekit
refuses it, or a table: tensor of the child -> its shared parameters, its base, and for each model the
tensor that is read and the parameters of it. Nothing is merged.
"""

import json
import sys

import yaml
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner


def tensors_of(file: str) -> dict:
    with open(file) as text:
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions(quiet=True)
    LoaderCache().setup(options=options)
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(
        config,
        architecture,
        options=options,
        out_model_config=_model_out_config(config, architecture),
    )
    found = {}
    for task in planner.plan_to_disk(out_path="never written"):
        if not isinstance(task, SaveTensor):
            continue
        merge = task.tensor_task
        gather = getattr(merge.gather_tensors, "gather_tensors", merge.gather_tensors)
        found[task.tensor_name] = {
            "shared": dict(merge.parameters),
            "base": str(merge.base_model) if merge.base_model else None,
            "models": {
                str(model): {
                    "tensor": gather.weight_info[model].name,
                    "parameters": dict(merge.input_parameters[model]),
                }
                for model in merge.model_order
            },
        }
    return found


answers = []
with open(sys.argv[1]) as listing:
    files = json.load(listing)
for file in files:
    try:
        answers.append(tensors_of(file))
    except Exception as error:
        print(f"{file}: {error}", file=sys.stderr)
        answers.append(None)
print(json.dumps(answers))
