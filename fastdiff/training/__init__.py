"""Training: data sets, losses and the loop, for any DiffusionModel whose network is a torch.nn.Module."""

from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Dataset, digits, load_data, npz
from fastdiff.training.loop import TrainingError, train

__all__ = ["Dataset", "TrainConfig", "TrainingError", "digits", "load_data", "npz", "train"]
