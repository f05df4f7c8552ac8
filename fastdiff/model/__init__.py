"""The networks that training and sampling share"""

from fastdiff.model.embeddings import timestep_embedding
from fastdiff.model.unet import PRESETS, UNet, UNetConfig

__all__ = ["PRESETS", "UNet", "UNetConfig", "timestep_embedding"]
