"""Other people's checkpoints, both ways"""

from fastdiff.convert.diffusers import unet_from_diffusers, unet_to_diffusers

__all__ = ["unet_from_diffusers", "unet_to_diffusers"]
