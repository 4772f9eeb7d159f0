"""Runs a script with FSDP or DeepSpeed on CPU processes; accelerate 1.15 has both for accelerators only.

FSDP would silently be DDP. Only the choice of the backend and of the device is replaced; everything else is
accelerate's and Trainer's own.
"""

from __future__ import annotations

import runpy
import sys

import torch
from accelerate.state import DistributedType, PartialState


def gloo(*args, **kwargs):
    """What `_prepare_backend` would say of processes with a GPU each, but for the backend."""
    return "gloo", DistributedType.MULTI_GPU


def cpu(self):
    """The device of every process."""
    self.device = torch.device("cpu")


PartialState._prepare_backend = gloo
PartialState.set_device = cpu
torch.accelerator.current_device_index = lambda: 0  # what no CPU has
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
