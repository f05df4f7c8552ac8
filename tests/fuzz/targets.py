"""What is fuzzed: for each thing that reads what others wrote, inputs, how they are damaged, and what they say

What "silent" can mean. fastdiff's own checkpoints, and the pipelines that it writes, hold a hash: a change of the
weights must be refused, and so must one that a .pt's checksums tell. Other foreign files hold none, so that a flipped
bit inside a tensor's bytes cannot be seen; there it is held that what is loaded is, key for key, shape for shape and
bit for bit, what the damaged file says to a reader written apart. A config that says something else must be refused or
taken at its word: whoever writes out what was loaded gets the same config again.
"""

from __future__ import annotations

import importlib.util

import torch

from . import guided, native
from .harness import Target

__all__ = ["KINDS", "targets"]

KINDS = ("native", "weights", "config", "diffusers", "scheduler", "guided")


def targets() -> list[Target]:
    """Every target; without diffusers, to which its own are compared, not those. torch's generators are left alone."""
    with torch.random.fork_rng(devices=[]):
        found = [*native.targets(), *guided.targets()]
        if importlib.util.find_spec("diffusers") is not None:
            from . import theirs

            found += theirs.targets()
    return found
