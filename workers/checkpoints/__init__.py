"""Checkpoints as they lie in a store: headers, layouts, ranged reads, streamed writes.

`open_checkpoint` reads only headers and small files; tensor bytes are read through
`CheckpointReader` and written through `CheckpointWriter`. `ArchitectureMap` names the component,
layer and expert of every stored element. Nothing here imports torch.
"""

from workers.checkpoints.architecture import COMPONENTS, ArchitectureMap, LogicalTensor
from workers.checkpoints.checkpoint import Checkpoint, WeightFile, open_checkpoint
from workers.checkpoints.reader import CheckpointReader, localize
from workers.checkpoints.safetensors_format import TensorEntry
from workers.checkpoints.writer import CheckpointWriter, publish_companions

__all__ = [
    "COMPONENTS",
    "ArchitectureMap",
    "Checkpoint",
    "CheckpointReader",
    "CheckpointWriter",
    "LogicalTensor",
    "TensorEntry",
    "WeightFile",
    "localize",
    "open_checkpoint",
    "publish_companions",
]
