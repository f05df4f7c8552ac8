"""Fused operations for diffusion models; needs torch only"""

from .ada_group_norm import ada_group_norm
from .guided_step import COEFS, NUM_COEFS, guided_step
from .load_row import load_row
from .philox import STREAM_STEP, STREAM_TRAINING, STREAM_X_T, philox_normal, philox_uint32
from .q_sample import q_sample
from .residual import residual

__all__ = [
    "COEFS",
    "NUM_COEFS",
    "STREAM_STEP",
    "STREAM_TRAINING",
    "STREAM_X_T",
    "ada_group_norm",
    "guided_step",
    "load_row",
    "philox_normal",
    "philox_uint32",
    "q_sample",
    "residual",
]
__version__ = "0.1.0"
