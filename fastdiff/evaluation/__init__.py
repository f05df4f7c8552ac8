"""How faithful and how diverse a model's images are, measured against real ones, with error bars."""

from fastdiff.evaluation.figures import Judge, features, frechet_distance, nearest_distance, real_split_distance, spread
from fastdiff.evaluation.report import evaluate, table

__all__ = [
    "Judge",
    "evaluate",
    "features",
    "frechet_distance",
    "nearest_distance",
    "real_split_distance",
    "spread",
    "table",
]
