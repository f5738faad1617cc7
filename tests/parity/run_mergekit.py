"""Run by mergekit's own Python: many merges in one process, since starting it takes longer than they do.

The argument is a JSON file, a list of [configuration, output folder]; prints a JSON list of what each
ended with: null, or the error.
"""

import json
import sys

from mergekit.scripts.run_yaml import main

outcomes = []
with open(sys.argv[1]) as file:
    merges = json.load(file)
for config, out in merges:
    try:
        main([config, out, "--random-seed", "0", "--quiet"], standalone_mode=False)
    except Exception as error:
        outcomes.append(f"{type(error).__name__}: {error}")
    else:
        outcomes.append(None)
print(json.dumps(outcomes))
