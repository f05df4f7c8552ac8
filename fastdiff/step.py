"""One row of a table for one batch shape: static buffers, what is computed once for all rows, and what a graph holds"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.cuda_graph import GraphedStep, Pool
from fastdiff.diffusion_model import Network, is_conditioned_apart
from fastdiff.guidance import GuidancePlan, classifier_gradient
from fastdiff.networks import Networks
from fastdiff.solvers import StepTable
from fastdiff_kernels import COEFS, STREAM_X_T, guided_step, load_row, philox_normal

__all__ = ["Randomness", "Shape", "Step", "bucket"]

# a table of all rows' modulations up to here; above, one of their embeddings, and a product in every step
MODULATION_BYTES = 2**28
# rows of the conditioning that are computed at once
CONDITIONED_AT_ONCE = 4096
LEAST_CAPACITY = 64
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bucket(n: int) -> int:
    """The batch size of the graph that serves n images: 1, 2, 3, 4, 6, 8, 12, 16, ..., at most half as many again"""
    power = 1 << max(n - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power if n else 0


@dataclass(frozen=True)
class Shape:
    """All that buffers and graphs depend on, but for the networks' weights

    n: images; m: those with a null row; capacity: rows of a table that fit; classified: whether a classifier guides;
    extra: name, shape of one image's and dtype of each further input.
    """

    n: int
    m: int
    capacity: int
    stochastic: bool
    learned: bool
    has_history: bool
    has_noise: bool
    wants_x0: bool
    classified: bool = False
    extra: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()

    @classmethod
    def of(
        cls,
        table: StepTable,
        n: int,
        m: int,
        *,
        has_noise: bool,
        wants_x0: bool,
        classified: bool = False,
        extra: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Shape:
        """dtype: what floating-point tensors of extra (rows, ...) are cast to"""
        return cls(
            n=n,
            m=m,
            capacity=max(LEAST_CAPACITY, 1 << (len(table) - 1).bit_length()),
            stochastic=table.stochastic,
            learned=table.learned,
            has_history=table.has_history,
            has_noise=has_noise,
            wants_x0=wants_x0,
            classified=classified,
            extra=tuple(
                (name, tuple(values.shape[1:]), dtype if values.is_floating_point() else values.dtype)
                for name, values in sorted((extra or {}).items())
            ),
        )

    @property
    def guides(self) -> bool:
        """Whether a guided row differs from one that is not"""
        return self.m > 0 or self.classified


@dataclass(frozen=True)
class Randomness:
    """Where one batch's randomness comes from: its seeds, or the caller's own tensors"""

    seeds: torch.Tensor
    x_T: torch.Tensor | None
    noise: Callable[[int], torch.Tensor] | None


Extra = dict[str, torch.Tensor]


class _Plain:
    """Any network(x, t, y, **extra) over B rows"""

    shares_x = False

    def __init__(
        self, network: Network, rows: int, has_labels: bool, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        """dtype: of its input, where that is not x's own"""
        self.network = network
        self.dtype = dtype
        self.has_labels = has_labels
        self.y = torch.zeros(rows, dtype=torch.int64, device=device) if has_labels else None

    def static(self) -> list[torch.Tensor]:
        return [] if self.y is None else [self.y]

    def fill(self, times: torch.Tensor, y: torch.Tensor | None) -> None:
        if self.y is not None and y is not None:
            self.y.copy_(y)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, draw: torch.Tensor, live: int, extra: Extra) -> torch.Tensor:
        y = None if self.y is None else self.y[:live]
        return self.network(self._cast(x[:live]), t[:live], y, **{k: self._cast(v[:live]) for k, v in extra.items()})

    def _cast(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.dtype is None or not values.is_floating_point() else values.to(self.dtype)


class _Hoisted:
    """A network of the protocol: what depends on time and label alone is computed once for all rows of the table

    Both rows of an image share its x. table: (capacity, B, R) modulations, or (capacity, B, E) embeddings.
    """

    shares_x = True

    def __init__(self, network: Any, rows: int, capacity: int, has_labels: bool, device: torch.device) -> None:
        self.network = network
        self.has_labels = has_labels
        one = torch.zeros(1, device=device)
        embedding = network.embedding(one, one.long() if has_labels else None)
        found = network.modulation(embedding)
        self.modulated = capacity * rows * found.nbytes <= MODULATION_BYTES
        kept = found if self.modulated else embedding
        self.table = kept.new_zeros(capacity, rows, kept.shape[1])

    def static(self) -> list[torch.Tensor]:
        return [self.table]

    def fill(self, times: torch.Tensor, y: torch.Tensor | None) -> None:
        rows = self.table.shape[1]
        at_once = max(1, CONDITIONED_AT_ONCE // rows)
        for start in range(0, len(times), at_once):
            part = times[start : start + at_once]
            kept = self.network.embedding(part.repeat_interleave(rows), None if y is None else y.repeat(len(part)))
            if self.modulated:
                kept = self.network.modulation(kept)
            self.table[start : start + len(part)].copy_(kept.view(len(part), rows, -1))

    def __call__(self, x: torch.Tensor, t: torch.Tensor, draw: torch.Tensor, live: int, extra: Extra) -> torch.Tensor:
        row = self.table[:, :live].index_select(0, draw)[0]
        mod = row if self.modulated else self.network.modulation(row)
        return self.network.body(x[:live], mod, **{name: values[:live] for name, values in extra.items()})


class Step:
    """load_row, the network on N + M rows, guided_step: buffers at fixed addresses, and the graphs over them

    Everything that differs between calls goes into the buffers in fill; a row reads nothing else.
    """

    def __init__(self, networks: Networks, shape: Shape) -> None:
        self.networks, self.shape = networks, shape
        n, m, device = shape.n, shape.m, networks.device
        image = networks.image_shape

        def new(*size: int, dtype: torch.dtype = networks.state_dtype) -> torch.Tensor:
            layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
            return torch.zeros(size, dtype=dtype, device=device).contiguous(memory_format=layout)

        def part(network: Network, rows: int, has_labels: bool, dtype: torch.dtype | None = None) -> _Plain | _Hoisted:
            if is_conditioned_apart(network):
                return _Hoisted(network, rows, shape.capacity, has_labels, device)
            return _Plain(network, rows, has_labels, device, dtype)

        apart = networks.null_network is not None
        self.part = part(networks.network, n if apart else n + m, networks.has_labels)
        self.null_part = None
        if networks.null_network is not None and m:
            labelled = networks.has_labels and not networks.null_unlabelled
            self.null_part = part(networks.null_network, m, labelled, networks.null_dtype)
        self.table = new(shape.capacity, len(COEFS))
        self.times = new(shape.capacity)
        self.counter = new(1, dtype=torch.int64)
        self.coefs = new(len(COEFS))
        self.draw = new(1, dtype=torch.int64)
        self.x = new(n, *image)
        self.x0 = new(n, *image) if shape.wants_x0 else None
        self.noise = new(n, *image) if shape.has_noise else None
        self.hist = new(n, *image) if shape.has_history else None
        self.seeds = new(n, dtype=torch.int64)
        self.w = new(n)
        doubled = n + (0 if apart or self.part.shares_x else m)
        self.x_net = new(doubled, *image, dtype=networks.dtype)
        self.t = new(doubled)
        self.extra: Extra = {name: new(doubled, *size, dtype=dtype) for name, size, dtype in shape.extra}
        self.classes = new(n, dtype=torch.int64) if shape.classified else None
        self.classifier_scale = new(n) if shape.classified else None
        # of rows that are guided, and of those that are not
        self.graphs: dict[bool, GraphedStep] = {}
        # what was allocated here goes back to this stream
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def static(self) -> Iterator[torch.Tensor]:
        """Every tensor through which calls, rows and replays speak"""
        for value in vars(self).values():
            if isinstance(value, torch.Tensor):
                yield value
        for part in (self.part, self.null_part):
            if part is not None:
                yield from part.static()
        yield from self.extra.values()

    def capture(self, guided: bool, pool: Pool | None) -> None:
        """A graph of a row that is guided or not; fill comes after"""
        guided = guided and self.shape.guides
        if guided not in self.graphs:
            self.graphs[guided] = GraphedStep(lambda: self.run(guided), self.static(), pool=pool)

    def fill(
        self,
        table: StepTable,
        plan: GuidancePlan,
        randomness: Randomness,
        extra: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Everything for a call; images and null rows beyond the plan's are of no consequence

        extra: (N, ...) each, in the caller's order.
        """
        rows, shape = len(table), self.shape
        for buffer, values in ((self.table, table.pack(COEFS)), (self.times, table.t)):
            buffer.zero_()[:rows].copy_(torch.from_numpy(values.copy()))
        self.seeds.zero_()[: plan.N].copy_(randomness.seeds[plan.order])
        self.w.zero_()[: plan.N].copy_(plan.w)
        labels: torch.Tensor | None = None
        null: torch.Tensor | None = None
        if plan.y is not None:
            # any valid label will do beyond
            labels = plan.y[:1].expand(shape.n).clone()
            labels[: plan.N] = plan.y
            null = labels[: shape.m]
            if self.networks.null_network is None:
                null = torch.full_like(null, -1 if self.networks.null_label is None else self.networks.null_label)
        device, times = self.networks.device, self.times[:rows]
        if self.null_part is not None:
            self.null_part.fill(times, null.to(device) if null is not None and self.null_part.has_labels else None)
        elif labels is not None and null is not None and self.networks.null_network is None:
            labels = torch.cat((labels, null))
        self.part.fill(times, None if labels is None else labels.to(device))
        if randomness.x_T is None:
            size = self.networks.image_shape
            self.x.copy_(philox_normal(self.seeds, size, draw=0, stream=STREAM_X_T, dtype=self.x.dtype))
        else:
            self.x.zero_()[: plan.N].copy_(randomness.x_T[plan.order])
        for name, buffer in self.extra.items():
            given = (extra or {})[name]
            ordered = given[plan.order.to(given.device)]
            # an image's own values are valid ones for those beyond, too
            buffer[:] = ordered[:1]
            buffer[: plan.N].copy_(ordered)
            buffer[shape.n :].copy_(buffer[: len(buffer) - shape.n])
        if self.classes is not None and self.classifier_scale is not None:
            assert plan.classes is not None and plan.classifier_scale is not None
            self.classes.zero_()[: plan.N].copy_(plan.classes)
            self.classifier_scale.zero_()[: plan.N].copy_(plan.classifier_scale)
        self.x_net[: shape.n].copy_(self.x)
        self.x_net[shape.n :].copy_(self.x[: len(self.x_net) - shape.n])
        for state in (self.x0, self.noise, self.hist, self.coefs, self.t, self.counter, self.draw):
            if state is not None:
                state.zero_()

    def __call__(self, guided: bool) -> None:
        """The next row: guided, by its null rows and a classifier, or by neither"""
        guided = guided and self.shape.guides
        self.graphs.get(guided, lambda: self.run(guided))()

    def run(self, guided: bool) -> None:
        """What a graph captures: no host read, no branch on device data"""
        load_row(self.table, self.times, self.counter, self.coefs, self.t, self.draw)
        # before the network, so that not both hold their activations
        grad = self.gradient() if guided and self.shape.classified else None
        philox = self.shape.stochastic and self.noise is None
        guided_step(
            self.x,
            self.evaluate(self.shape.m if guided else 0),
            self.coefs,
            self.w,
            x_net=self.x_net,
            x0=self.x0,
            hist=self.hist,
            grad=grad,
            noise=self.noise,
            seeds=self.seeds if philox else None,
            draw=self.draw if philox else None,
            learned=self.shape.learned,
        )

    def gradient(self) -> torch.Tensor:
        """The classifier's, (N, C, H, W), times each image's scale"""
        networks, n = self.networks, self.shape.n
        assert networks.classifier is not None and self.classes is not None and self.classifier_scale is not None
        return classifier_gradient(
            networks.classifier,
            self.x,
            self.t[:n],
            self.classes,
            self.classifier_scale,
            num_classes=networks.num_classes,
            dtype=networks.classifier_dtype,
        )

    def evaluate(self, m: int) -> torch.Tensor:
        """The network's output of N + m rows, those that guidance leads away from with its channels only"""
        out = self._rows(m)
        guided, n = self.networks.guided_channels, self.shape.n
        if guided is None or not m:
            return out
        # (1 + w) * c - w * c is c
        return torch.cat((out[:n], torch.cat((out[n:, :guided], out[:m, guided:]), 1)))

    def _rows(self, m: int) -> torch.Tensor:
        n, learned = self.shape.n, self.shape.learned
        if self.null_part is None or not m:
            live = n + m
            return self._checked(self.part(self.x_net, self.t, self.draw, live, self.extra), live, learned)
        out = self._checked(self.part(self.x_net, self.t, self.draw, n, self.extra), n, learned)
        null = self._checked(self.null_part(self.x_net, self.t, self.draw, m, self.extra), m, False).to(out.dtype)
        channels = self.networks.image_shape[0]
        if not learned:
            return torch.cat((out[:, :channels], null[:, :channels]))
        # the variance is the conditional half's; a null row's is not read
        return torch.cat((out, null if null.shape == out[:m].shape else null.repeat(1, 2, 1, 1)))

    def _checked(self, out: Any, live: int, learned: bool) -> torch.Tensor:
        C, H, W = self.networks.image_shape
        shapes = [(live, 2 * C, H, W)] if learned else [(live, C, H, W), (live, 2 * C, H, W)]
        narrower = [dtype for dtype in FLOATS if dtype.itemsize <= self.networks.state_dtype.itemsize]
        if isinstance(out, torch.Tensor) and out.dtype not in narrower:
            raise TypeError(f"network(x, t, y) must return {' or '.join(map(str, narrower))}, got {out.dtype}")
        if not isinstance(out, torch.Tensor) or tuple(out.shape) not in shapes:
            got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(
                f"network(x, t, y) must return a tensor of shape {' or '.join(map(str, shapes))}, got {got}"
            )
        return out
