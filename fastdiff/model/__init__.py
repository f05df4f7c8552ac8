"""The networks that training and sampling share"""

from fastdiff.model.classifier import CLASSIFIER_PRESETS, EncoderConfig, EncoderUNet
from fastdiff.model.embeddings import timestep_embedding
from fastdiff.model.super_resolution import UPSAMPLER_PRESETS, SuperResolutionConfig, SuperResolutionUNet
from fastdiff.model.trunk import TrunkConfig
from fastdiff.model.unet import PRESETS, UNet, UNetConfig

__all__ = [
    "CLASSIFIER_PRESETS",
    "PRESETS",
    "UPSAMPLER_PRESETS",
    "EncoderConfig",
    "EncoderUNet",
    "SuperResolutionConfig",
    "SuperResolutionUNet",
    "TrunkConfig",
    "UNet",
    "UNetConfig",
    "timestep_embedding",
]
