"""Where a network runs and in which dtype: an explicit choice is met or refused, never replaced."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Hashable, Iterator, Mapping
from types import CellType, FunctionType, MethodType, ModuleType, NoneType

import torch

from fastdiff.classifier import Classifier
from fastdiff.diffusion_model import DiffusionModel, Network, is_conditioned_apart

__all__ = [
    "DTYPES",
    "OutOfMemoryError",
    "Placed",
    "addresses",
    "device_of",
    "dtype_of",
    "eval_mode",
    "fingerprint",
    "placed",
    "preferred_dtype",
    "resolve_device",
    "resolve_dtype",
    "runnable_dtype",
]

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}

# of eight bytes; a prime, so that rows that change places change the sums
_COLUMNS = 1021
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The torch device meant; None is a GPU if there is one. ValueError for one that is unknown or absent."""
    if str(device) in ("cpu", "cpu:0"):
        return torch.device("cpu")  # without waking a driver
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None and not gpus:
        return torch.device("cpu")
    device = "cuda" if device is None else device
    choices = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    if str(device) not in choices:
        why = "" if gpus else ", torch sees no GPU"
        raise ValueError(f"device must be one of {choices} here{why}; got {str(device)!r}")
    # with its index, as tensors report it
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else torch.device(device)


def device_of(model: DiffusionModel) -> torch.device:
    return device_of_network(model.network)


def device_of_network(network: Network) -> torch.device:
    """Of its first parameter or buffer; the CPU for functions."""
    if not isinstance(network, torch.nn.Module):
        return torch.device("cpu")
    return next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    return DTYPES[name]


def runnable_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """A recorded dtype, but float32 for float16 on a CPU, which has no fast arithmetic for it."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def preferred_dtype(model: DiffusionModel | Classifier, device: torch.device) -> torch.dtype | None:
    """The recorded dtype, as runnable; where none is recorded what suits the hardware for a network of fastdiff or of
    its protocol, and None for others, which stay."""
    if model.dtype is not None:
        return runnable_dtype(model.dtype, device)
    if is_conditioned_apart(model.network) or getattr(model.network, "any_dtype", False):
        fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return None


def dtype_of(model: DiffusionModel | Classifier) -> torch.dtype:
    """Of the network's first floating-point parameter or buffer; float32 for functions."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def fits(network: torch.nn.Module, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether all of it lies on device in dtype; None leaves every parameter's own.

    On a GPU the weights of a network of our protocol are channels_last, too, or each step would convert them.
    """
    layout = _layout(network, device)
    return all(
        p.device == device
        and (dtype in (None, p.dtype) or not p.is_floating_point())
        and (layout is None or p.ndim != 4 or p.is_contiguous(memory_format=layout))
        for p in (*network.parameters(), *network.buffers())
    )


def _layout(network: torch.nn.Module, device: torch.device) -> torch.memory_format | None:
    return torch.channels_last if device.type == "cuda" and is_conditioned_apart(network) else None


def placed(
    network: torch.nn.Module, device: torch.device, dtype: torch.dtype | None, reuse: Network | None = None
) -> torch.nn.Module:
    """The network itself where it fits already, else a converted copy.

    reuse: an earlier copy of the same modules, into whose memory the weights of today go.
    """
    if fits(network, device, dtype):
        return network
    tensors = [*network.parameters(), *network.buffers()]
    if isinstance(reuse, torch.nn.Module):
        old = [*reuse.parameters(), *reuse.buffers()]
        if [p.shape for p in old] == [p.shape for p in tensors]:
            for mine, now in zip(old, tensors, strict=True):
                mine.copy_(now)
            return reuse
    converted, layout = copy.deepcopy(network).to(device, dtype), _layout(network, device)
    return converted if layout is None else converted.to(memory_format=layout)  # type: ignore[call-overload]


def addresses(network: Network) -> Hashable:
    """What a graph holds of a network: which modules, and where their parameters and buffers lie and how.

    Of a function: of the modules that it, what it is a part of, or what it closes over refers to.
    """
    found = []
    for module in _modules_in(network, depth=3):
        tensors = [*module.parameters(), *module.buffers()]
        found.append((structure(module), *((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)))
    return id(network), tuple(found)


def _modules_in(value: object, depth: int) -> list[torch.nn.Module]:
    if isinstance(value, torch.nn.Module):
        return [value]
    if depth == 0 or isinstance(value, type | ModuleType | torch.Tensor | str | bytes):
        return []
    parts: list[object] = []
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        parts = [value.__self__]
    elif isinstance(value, FunctionType):
        names = (value.__globals__.get(name) for name in value.__code__.co_names)
        parts = [*(cell.cell_contents for cell in value.__closure__ or () if _filled(cell)), *names]
    elif isinstance(value, Mapping):
        parts = [*value.values()]
    elif isinstance(value, list | tuple):
        parts = [*value]
    elif hasattr(value, "__dict__"):
        parts = [*vars(value).values()]
    return [module for part in parts for module in _modules_in(part, depth - 1)]


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


class Placed:
    """What runs for a network, with the weights of today: itself, a converted copy, or on a CPU its packed form"""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype
        self._source: Network | None = None
        self._copy: Network | None = None  # or the network itself
        self._packed: Network | None = None
        self._modules: Hashable = None
        self._weights: Hashable = None

    @contextlib.contextmanager
    def current(self, network: Network) -> Iterator[Network]:
        """The network that runs, in eval mode"""
        if network is not self._source:
            self._source, self._copy, self._packed, self._modules, self._weights = network, None, None, None, None
        pack = getattr(network, "packed", None) if is_conditioned_apart(network) else None
        packs = self.device.type == "cpu" and callable(pack)
        if not isinstance(network, torch.nn.Module) or (not packs and fits(network, self.device, self.dtype)):
            self._copy = self._packed = network
        else:
            self._follow(network)
        assert self._copy is not None
        with eval_mode(self._copy):
            if self._packed is None:
                self._packed = self._copy.packed() if packs else self._copy  # type: ignore[attr-defined]
            yield self._packed

    def _follow(self, network: torch.nn.Module) -> None:
        """Brings the copy up to date, and gives up a packed form that no longer is"""
        modules, weights = structure(network), fingerprint(network)
        if modules != self._modules:
            self._copy = None
        # weights elsewhere than on a CPU are not looked at
        if self._copy is None or weights != self._weights or device_of_network(network).type != "cpu":
            self._copy = placed(network, self.device, self.dtype, None if self._copy is network else self._copy)
            self._packed = None
        self._modules, self._weights = modules, weights


def structure(network: torch.nn.Module) -> Hashable:
    """Equal for two calls only where no submodule, hook, forward or plain attribute has been replaced in between"""
    return tuple((name, id(module), type(module), *_attributes(module)) for name, module in network.named_modules())


def _attributes(module: torch.nn.Module) -> Iterator[Hashable]:
    own = vars(module)
    yield own.get("forward")
    yield from (len(own[hooks]) for hooks in _HOOKS)
    # the mode is the sampler's to set
    plain = (bool, int, float, str, tuple, NoneType)
    yield from ((k, v) for k, v in own.items() if isinstance(v, plain) and k != "training" and _is_hashable(v))


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def fingerprint(network: torch.nn.Module) -> Hashable:
    """Equal for two calls only where no parameter or buffer has changed in between, but for a collision

    On a CPU every weight is read once, so that writes without a trace in a version counter are seen: p.data.copy_.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return tuple((name, *_identity(tensor), _checksum(tensor)) for name, tensor in tensors)


def _identity(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, version


def _checksum(tensor: torch.Tensor) -> int:
    """A hash of a tensor's bytes on a CPU, of which all but the last are summed in columns first"""
    if tensor.device.type != "cpu":
        return 0
    tensor = tensor.detach()
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    raw = tensor.flatten().contiguous().view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    summed = raw.numel() // (8 * _COLUMNS) * (8 * _COLUMNS)
    columns = raw[:summed].view(torch.int64).view(-1, _COLUMNS).sum(0)
    return hash(columns.numpy().tobytes() + raw[summed:].numpy().tobytes())


# how many are sampling each module right now, and the mode it goes back to after the last of them
_sampled: dict[torch.nn.Module, tuple[int, bool]] = {}
_sampled_lock = threading.Lock()


@contextlib.contextmanager
def eval_mode(network: object) -> Iterator[None]:
    """Dropout off while anybody samples the network; every submodule gets its own mode back after the last of them."""
    modules = list(network.modules()) if isinstance(network, torch.nn.Module) else []
    with _sampled_lock:
        for module in modules:
            users, mode = _sampled.get(module, (0, module.training))
            _sampled[module] = users + 1, mode
            module.training = False
    try:
        yield
    finally:
        with _sampled_lock:
            for module in modules:
                users, mode = _sampled.pop(module)
                if users > 1:
                    _sampled[module] = users - 1, mode
                else:
                    module.training = mode


class OutOfMemoryError(torch.OutOfMemoryError):
    """The device's memory does not hold a batch; batch_size is one that was tried and fits, 0 if none does."""

    def __init__(self, message: str, batch_size: int) -> None:
        super().__init__(message)
        self.batch_size = batch_size
