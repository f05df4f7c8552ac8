"""Other people's checkpoints, both ways"""

from fastdiff.convert.diffusers import unet_from_diffusers, unet_to_diffusers
from fastdiff.convert.schedulers import SchedulerFacts, scheduler_from_diffusers, scheduler_to_diffusers

__all__ = [
    "SchedulerFacts",
    "scheduler_from_diffusers",
    "scheduler_to_diffusers",
    "unet_from_diffusers",
    "unet_to_diffusers",
]
