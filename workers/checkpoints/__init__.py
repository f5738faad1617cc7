"""Checkpoints as they lie in a store: headers, layouts, ranged reads, streamed writes.

`open_checkpoint` reads only headers and small files; tensor bytes are read through
`CheckpointReader`, `child_layout` says what a child will look like, and `publish_companions` makes its
written files a checkpoint. `ArchitectureMap` names the component,
layer and expert of every stored element. Nothing here imports torch.
"""

from workers.checkpoints.architecture import ArchitectureMap, LogicalTensor
from workers.checkpoints.checkpoint import Checkpoint, WeightFile
from workers.checkpoints.layout import Form, Layout, child_layout
from workers.checkpoints.names import COMPONENTS
from workers.checkpoints.opening import absolute_checkpoint_location, check_same, open_checkpoint
from workers.checkpoints.publishing import publish_companions
from workers.checkpoints.reader import CheckpointReader, localize
from workers.checkpoints.safetensors_format import TensorEntry

__all__ = [
    "COMPONENTS",
    "ArchitectureMap",
    "Checkpoint",
    "CheckpointReader",
    "Form",
    "Layout",
    "LogicalTensor",
    "TensorEntry",
    "WeightFile",
    "absolute_checkpoint_location",
    "check_same",
    "child_layout",
    "localize",
    "open_checkpoint",
    "publish_companions",
]
