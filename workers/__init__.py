"""What runs on the nodes: bytes, checkpoints, merging, evaluation and the Ray actors around them.

The rooms from the ground up, each importing only those before it (checked by `lint-imports`):
`storage` <- `checkpoints` <- `merging` <- `evaluation` <- `actors` <- `gang`.
Nothing here knows of searches, campaigns or users; only `actors` imports ray.
"""
