"""fastdiff evaluate: fidelity, diversity and likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastdiff.cli.arguments import Device, Dtype, ModelName, Quiet, check_png, classifier_facts, option, parse_steps

__all__ = ["Evaluate"]

CLASSIFIER_OPTIONS = ("classifier", "classifier_scales", "classifier_form", "variance")


@dataclass(frozen=True)
class Evaluate:
    """Measure fidelity and diversity over the strength of guidance, or the likelihood of real images."""

    model: ModelName = "digits"
    """A bundled model's name, or a checkpoint's folder."""
    likelihood: bool = False
    """Bits per dimension of --data instead: the variational bound, at every level of the chain."""
    data: Annotated[str | None, option("DATA", "digits; with --likelihood digits:heldout")] = None
    """Real images: digits, digits:heldout, or an .npz."""
    heldout: Annotated[str | None, option("DATA", "digits:heldout")] = None
    """Other real images, from which the judge learns."""
    weights: Annotated[tuple[float, ...] | None, option("W [W ...]", "0 0.1 0.3 0.5 1 1.5 2 4")] = None
    """Guidance weights."""
    classifier: Annotated[str | None, option("NAME|FOLDER", "none guides")] = None
    """A classifier of noisy images, to guide at w = 0 by each of --classifier-scales."""
    classifier_scales: Annotated[tuple[float, ...] | None, option("SCALE [SCALE ...]", "none")] = None
    """What its gradient is multiplied by."""
    classifier_form: Annotated[str | None, option("FORM", "mean for ddpm, else score")] = None
    """As in fastdiff sample."""
    variance: Annotated[str | None, option("NAME", "the model's")] = None
    """Of ddpm's steps: fixed_small, fixed_large or learned_range."""
    images: Annotated[int | None, option("N", "1000; with --likelihood all")] = None
    """Images at each weight and seed; with --likelihood the first N of --data."""
    seeds: Annotated[tuple[int, ...] | None, option("SEED [SEED ...]", "0 1 2; with --likelihood 0")] = None
    """At least two, for the error bars; with --likelihood one."""
    steps: Annotated[str | None, option("STEPS", "ddim25; with --likelihood the whole chain")] = None
    """As in fastdiff sample."""
    solver: Annotated[str | None, option("NAME", "ddim")] = None
    """As in fastdiff sample."""
    batch_size: Annotated[int, option("N")] = 100
    """Images at a time."""
    device: Device = None
    """cpu, cuda or cuda:N."""
    dtype: Dtype = None
    """Compute dtype: float32, bfloat16, float16 or float64; with --likelihood float32 if left out."""
    out: Annotated[str | None, option("PATH", "nothing is kept", "-o")] = None
    """A .jsonl file, or a folder for one, to append results to; what it holds already is not measured again."""
    plot: Annotated[str | None, option("FILE", "no plot")] = None
    """Draw the trade-off, or the bits over the chain, into a .png."""
    force: bool = False
    """Replace the plot that is there."""
    quiet: Quiet = False
    """No progress bar."""

    def run(self) -> int:
        """Measures, and prints the table."""
        from fastdiff import checkpoint, evaluation
        from fastdiff.canvas import require_matplotlib
        from fastdiff.evaluation import plot

        if self.plot is not None:
            require_matplotlib()
            check_png("--plot", self.plot, self.force)
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "device": self.device,
            "dtype": self.dtype,
            "model_sha256": checkpoint.info(self.model)["sha256"],
            "progress": not self.quiet,
            "out": self.out,
        }
        if self.steps is not None:
            options["steps"] = parse_steps(self.steps)
        report = self._bound(options) if self.likelihood else self._tradeoff(options)
        print(evaluation.likelihood_table(report) if self.likelihood else evaluation.table(report), end="")
        if self.plot is not None:
            draw = plot.bits_by_t if self.likelihood else plot.tradeoff
            print(f"\nplot    {draw(report, self.plot)}")
        return 0

    def _tradeoff(self, options: dict[str, Any]) -> dict[str, Any]:
        from fastdiff import evaluation, training

        data = "digits" if self.data is None else self.data
        heldout = "digits:heldout" if self.heldout is None else self.heldout
        real = [training.load_data(name) for name in (data, heldout)]
        for name in ("weights", "images", "seeds", "solver", *CLASSIFIER_OPTIONS):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        if self.classifier is not None:
            options["classifier_sha256"] = classifier_facts(self.classifier, None)["classifier_sha256"]
        return evaluation.evaluate(self.model, *((each.images, each.labels) for each in real), **options)

    def _bound(self, options: dict[str, Any]) -> dict[str, Any]:
        from fastdiff import checkpoint, evaluation, training
        from fastdiff.placement import resolve_device, resolve_dtype

        for name in ("heldout", "weights", "solver", *CLASSIFIER_OPTIONS):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be left out with --likelihood, which no samples are drawn for"
                )
        if self.seeds is not None and len(self.seeds) != 1:
            raise ValueError(f"--seeds must be one integer with --likelihood, got {' '.join(map(str, self.seeds))}")
        real = training.load_data("digits:heldout" if self.data is None else self.data)
        n = len(real) if self.images is None else self.images
        if not 2 <= n <= len(real):
            raise ValueError(f"--images must be in [2, {len(real)}], as many as {real.name} has, got {n}")
        model = checkpoint.load(self.model, device=resolve_device(self.device), dtype=resolve_dtype(self.dtype))
        labels = None if real.num_classes is None or model.num_classes is None else real.labels[:n]
        seed = 0 if self.seeds is None else self.seeds[0]
        return evaluation.bits_per_dimension(model, real.images[:n], labels, seed=seed, **options)
