"""How faithful and how diverse a model's images are, and how likely it finds real ones, with error bars."""

from fastdiff.evaluation.figures import Judge, features, frechet_distance, nearest_distance, real_split_distance, spread
from fastdiff.evaluation.likelihood import bits_per_dimension, likelihood_table
from fastdiff.evaluation.report import evaluate, table

__all__ = [
    "Judge",
    "bits_per_dimension",
    "evaluate",
    "features",
    "frechet_distance",
    "likelihood_table",
    "nearest_distance",
    "real_split_distance",
    "spread",
    "table",
]
