"""Sampling calls as they are written by hand, with diffusers' UNet2DModel in every setting that its users know"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import Call, Network, OnRow, Problem, placed
from fastdiff.convert import unet_to_diffusers
from fastdiff.model import UNet


def to_diffusers(unet: UNet) -> Any:
    """UNet2DModel with the weights of a network on the CPU; ImportError without diffusers"""
    from diffusers import UNet2DModel

    config, weights = unet_to_diffusers(unet)
    with torch.device("meta"):
        theirs: Any = UNet2DModel(**config)
    theirs.load_state_dict(weights, assign=True)
    return theirs.eval()


def why_no_diffusers() -> str | None:
    """None, or why there is no diffusers"""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None


def as_ours(network: Any) -> Network:
    """Takes and returns what fastdiff's network does"""
    return lambda x, t, y: network(x, t, class_labels=y, return_dict=False)[0]


def guided_ddim(
    network: Network, x: Tensor, t: Tensor, y: Tensor, coefs: Any, *, w: float, dtype: torch.dtype
) -> Tensor:
    """One row as it is written by hand: the state in float32, DDIM in the four coefficients it cannot do without"""
    k_x, k_out, c_x, c_x0 = coefs
    doubled = torch.cat([x, x]) if w else x
    eps = network(doubled.to(dtype), t, y)[:, : x.shape[1]].float()
    if w:
        cond, null = eps.chunk(2)
        eps = (1 + w) * cond - w * null
    x0 = (k_x * x + k_out * eps).clamp(-1, 1)
    return c_x * x + c_x0 * x0


class Loop:
    """step(x, t, y, coefs) -> x over all rows; coefs: a tuple of numbers a row"""

    def __init__(self, problem: Problem, step: Callable[..., Tensor], coefs: Any = None) -> None:
        self.problem, self.step = problem, step
        self.coefs = problem.coefs if coefs is None else coefs

    def __call__(self, on_row: OnRow = None) -> Tensor:
        x = self.problem.x_T
        with torch.no_grad():
            for t, coefs in zip(self.problem.times, self.coefs, strict=True):
                x = self.step(x, t, self.problem.y, coefs)
                if on_row is not None:
                    on_row()
        return x


def loop_over(problem: Problem, network: Network, dtype: torch.dtype | None = None) -> Loop:
    return Loop(problem, partial(guided_ddim, network, w=problem.case.w, dtype=dtype or problem.dtype))


def eager(problem: Problem, theirs: Any, *, channels_last: bool) -> Call:
    return loop_over(problem, as_ours(placed(theirs, problem, channels_last=channels_last)))


def in_float32(problem: Problem, theirs: Any) -> Call:
    """As it is loaded"""
    network = as_ours(placed(theirs, problem, torch.float32, channels_last=False))
    return loop_over(problem, network, torch.float32)


def compiled_network(problem: Problem, theirs: Any, *, freezing: bool) -> Call:
    """torch.compile of the network alone; freezing folds the weights into the program"""
    theirs = placed(theirs, problem, channels_last=True)
    # the options belong to what dynamo looks programs up by; a patched config does not
    options: dict[str, str | int | bool | Callable[..., Any]] = {"freezing": True} if freezing else {}
    return loop_over(problem, torch.compile(as_ours(theirs), dynamic=False, options=options))


def compiled_step(problem: Problem, theirs: Any) -> Call:
    """torch.compile(mode="max-autotune") of guidance, network and DDIM together"""
    theirs = placed(theirs, problem, channels_last=True)
    whole = partial(guided_ddim, as_ours(theirs), w=problem.case.w, dtype=problem.dtype)
    compiled = torch.compile(whole, dynamic=False, mode="max-autotune")

    def step(*arguments: Any) -> Tensor:
        # its result lies in memory that the next replay writes to
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*arguments).clone()

    # numbers would be compiled in, row by row
    return Loop(problem, step, torch.tensor(problem.coefs, device=problem.device).unbind())


def hand_captured(problem: Problem, theirs: Any) -> Call:
    """One CUDA graph of the eager channels_last step, its row's numbers copied in before each replay"""
    theirs = placed(theirs, problem, channels_last=True)
    network = as_ours(theirs)
    table = torch.tensor(problem.coefs, device=problem.device)
    x, t, coefs = problem.x_T.clone(), problem.times[0].clone(), table[0].clone()

    def body() -> None:
        row = coefs.unbind()
        x.copy_(guided_ddim(network, x, t, problem.y, row, w=problem.case.w, dtype=problem.dtype))

    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                body()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            body()

    def call(on_row: OnRow = None) -> Tensor:
        x.copy_(problem.x_T)
        for time, row in zip(problem.times, table, strict=True):
            t.copy_(time)
            coefs.copy_(row)
            graph.replay()
            if on_row is not None:
                on_row()
        return x.clone()

    return call


def peers(problem: Problem) -> dict[str, Callable[[Any], Call]]:
    """How a case is sampled with UNet2DModel, by provider: a function of the float32 network on the CPU"""
    made: dict[str, Callable[[Any], Call]] = {
        "diffusers-eager": partial(eager, problem, channels_last=False),
        "diffusers-channels-last": partial(eager, problem, channels_last=True),
    }
    if problem.device.type == "cuda":
        made["diffusers-compile"] = partial(compiled_step, problem)
        made["diffusers-graph"] = partial(hand_captured, problem)
    elif problem.dtype != torch.float32:
        made["diffusers-float32"] = partial(in_float32, problem)
        made["diffusers-compile"] = partial(compiled_network, problem, freezing=False)
        made["diffusers-freezing"] = partial(compiled_network, problem, freezing=True)
    return made
