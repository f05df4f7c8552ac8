"""What a class-conditional model has to reach, as numbers that were fixed before it was measured."""

from __future__ import annotations

from typing import Any

__all__ = ["criteria"]

MIN_ACCURACY = 0.97  # of the judge's accuracy on real images, at w = 1.5
MIN_SPREAD = 0.8  # of the real within-class spread, at w = 0
MAX_FRECHET = 3.0  # times the distance between two halves of the real images, at w = 0
# 1 % of held-out real images lie that near, by definition. Other splits of the real digits give .3 to 3.3 %, averages
# of two training images of a class 2.7 %, copies under noise of standard deviation .1 (pixels in [-1, 1]) 100 %.
MAX_NEAR_COPIES = 0.05
# Of the held-out median. Being merely typical does not reach it: other splits of the real digits give .97 to 1.03,
# class means .99, averages of two training images .95; copies under noise of standard deviation .1 and .2 give .39
# and .76.
MIN_NEAREST = 0.8

Figures = dict[str, Any]


def criteria(real: Figures, points: list[Figures]) -> list[Figures]:
    """Each criterion with its value, error (one standard deviation over seeds), bound, relation and whether it is met.

    The mean over seeds decides; for the two trade-offs the change from the least to the largest w must exceed the sum
    of both ends' errors. met is None where the weights that a criterion needs were not measured.
    """
    at = {point["w"]: point for point in points}
    halves = real["frechet_halves"]
    return [
        _check(
            "accuracy",
            f"accuracy at w = 1.5 (at least {MIN_ACCURACY:.0%} of the real {real['accuracy']['mean']:.3f})",
            at.get(1.5, {}).get("accuracy"),
            ">=",
            MIN_ACCURACY * real["accuracy"]["mean"],
        ),
        _check(
            "spread",
            f"within-class spread at w = 0 over the real one (at least {MIN_SPREAD:.0%})",
            at.get(0.0, {}).get("spread_ratio"),
            ">=",
            MIN_SPREAD,
        ),
        _check(
            "frechet",
            f"Fréchet distance at w = 0 (at most {MAX_FRECHET:g} times the {halves['mean']:.3f} between real halves of "
            f"{halves['sizes'][0]} and {halves['sizes'][1]})",
            at.get(0.0, {}).get("frechet"),
            "<=",
            MAX_FRECHET * halves["mean"],
        ),
        _trend("accuracy_rises", "accuracy", points, 1),
        _trend("spread_falls", "spread_ratio", points, -1),
        _check(
            "near_copies",
            "share of images at w = 0 nearer to a training image than 99 % of held-out real images are "
            f"(at most {MAX_NEAR_COPIES:.0%})",
            at.get(0.0, {}).get("near_copies"),
            "<=",
            MAX_NEAR_COPIES,
        ),
        _check(
            "nearest",
            "median distance at w = 0 to the nearest training image over that of held-out real images "
            f"(at least {MIN_NEAREST:g})",
            at.get(0.0, {}).get("nearest_ratio"),
            ">=",
            MIN_NEAREST,
        ),
    ]


def _check(name: str, claim: str, figure: Figures | None, relation: str, bound: float) -> Figures:
    value, error = (None, None) if figure is None else (figure["mean"], figure["std"])
    met = None if value is None else value >= bound if relation == ">=" else value <= bound
    return {
        "name": name,
        "claim": claim,
        "value": value,
        "error": error,
        "relation": relation,
        "bound": bound,
        "met": met,
    }


def _trend(name: str, figure: str, points: list[Figures], sign: int) -> Figures:
    """The change of one figure from the least w to the largest, against the sum of both error bars."""
    low, high = points[0], points[-1]
    words = "rise" if sign > 0 else "fall"
    ends = f"from w = {low['w']:g} to w = {high['w']:g}"
    claim = f"{words} of the {figure.replace('_', ' ')} {ends} (more than both error bars)"
    if len(points) < 2:
        return _check(name, claim, None, ">", 0.0)
    change = sign * (high[figure]["mean"] - low[figure]["mean"])
    error = low[figure]["std"] + high[figure]["std"]
    return {
        "name": name,
        "claim": claim,
        "value": change,
        "error": error,
        "relation": ">",
        "bound": error,
        "met": bool(change > error),
    }
