"""fastdiff inside diffusers"""

from fastdiff.integrations.diffusers.schedulers import FusedDDIMScheduler, FusedDDPMScheduler

__all__ = ["FusedDDIMScheduler", "FusedDDPMScheduler"]
