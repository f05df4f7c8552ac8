"""fastdiff inside diffusers, and diffusers' networks inside fastdiff"""

from fastdiff.integrations.diffusers.networks import DiTNetwork, UNet2DNetwork, dit_model, unet_model
from fastdiff.integrations.diffusers.schedulers import FusedDDIMScheduler, FusedDDPMScheduler

__all__ = ["DiTNetwork", "FusedDDIMScheduler", "FusedDDPMScheduler", "UNet2DNetwork", "dit_model", "unet_model"]
