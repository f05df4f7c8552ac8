"""Training: data sets, losses, timestep samplers and the loop, for any model whose network is a torch.nn.Module."""

from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Dataset, digits, load_data, npz
from fastdiff.training.log import read_log
from fastdiff.training.loop import TrainingError, train
from fastdiff.training.recipe import Recipe, read_recipe
from fastdiff.training.run import Run, Step, extra_of

__all__ = [
    "Dataset",
    "Recipe",
    "Run",
    "Step",
    "TrainConfig",
    "TrainingError",
    "digits",
    "extra_of",
    "load_data",
    "npz",
    "read_log",
    "read_recipe",
    "train",
]
