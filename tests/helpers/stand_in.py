"""A GPU made of CPU tensors: finds mixed devices, and counts waits and launches, where there is no GPU.

Within `StandIn()` a tensor that is moved to or made on "cuda" says that it lies there, and every operator
runs on the CPU tensor inside it. Operators that a GPU would refuse, of operands on two devices, raise; those
for which the host waits are noted with the line of our code that called them. What is copied to the host
without a wait arrives when an event is waited for that was recorded after it, and is nonsense before. All of
this is Python's part only: no kernels, streams, numbers or speed of a GPU.

To torch's own code the device is "meta", which it knows without a CUDA runtime; to ours it is "cuda".
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU, _INSIDE = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
ROOT = Path(__file__).parents[2]
_OURS = ("trainer", "embeddings", "pipelines")
# The host must know a value, or the size of what comes out.
_WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "bincount",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
# No kernel: views and what is known without one.
_FREE = {
    *("view", "detach", "alias", "expand", "slice", "select", "transpose", "t", "permute", "unsqueeze"),
    *(
        "squeeze",
        "unbind",
        "split",
        "split_with_sizes",
        "_unsafe_view",
        "as_strided",
        "diagonal",
        "unflatten",
    ),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "chunk", "view_as"),
    *("_reshape_alias", "lift_fresh", "is_pinned", "pin_memory", "record_stream", "set_"),
}
_COPIES = {"_to_copy", "copy_"}
_PINS = {"pin_memory", "_pin_memory", "is_pinned"}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class MixedDevices(RuntimeError):
    """Operands on two devices."""


class OnDevice(Tensor):
    """A CPU tensor that says it lies on the device."""

    inner: Tensor
    is_meta = False
    is_cuda = True
    device = CUDA

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_INSIDE,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner!r})"

    def tolist(self) -> Any:
        _current().waits[f"{_line()} tolist"] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _current().run(func, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """Runs what is done within it.

    Attributes:
        waits: "file:line operator" -> times that the host waits for the device: it asks for a value, or
            copies to or from it, unless `non_blocking` and, to it, from pinned memory.
        launches: operators that would start a kernel, by name.
        forward_and_backward: for whoever wants to note how many these were at some time.
    """

    current: StandIn | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.forward_and_backward = 0
        # Tensors of the host that numbers are on their way to, and these numbers.
        self.under_way: list[tuple[Tensor, Tensor]] = []
        self._patches = ExitStack()

    def __enter__(self) -> StandIn:
        StandIn.current = self
        self._patches.enter_context(patch.object(torch.cuda, "_lazy_init", lambda: None))
        # It copies where no mode sees it.
        self._patches.enter_context(patch.object(torch, "tensor", partial(_tensor, torch.tensor)))
        self._patches.enter_context(patch.object(torch.cuda, "Event", _Event))
        self._patches.enter_context(patch.object(torch.cuda, "current_stream", lambda _=None: None))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        StandIn.current = None

    def reset(self) -> None:
        """Count from zero."""
        self.waits.clear()
        self.launches.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        flat = list(_leaves((args, kwargs)))
        there = [part for part in flat if isinstance(part, OnDevice)]
        here = [part for part in flat if isinstance(part, Tensor) and not isinstance(part, OnDevice)]
        name = func._schema.name.removeprefix("aten::")
        if name in _PINS:
            return _pinned(name, args[0])
        asked = next((part for part in flat if isinstance(part, torch.device)), None)
        on_device = bool(there) if asked is None else asked.type != "cpu"
        # A tensor of no dimension is as good as a number.
        mixed = there and any(part.dim() for part in here)
        if mixed and name not in _COPIES | _INDEXED:
            raise MixedDevices(f"{name} at {_line()}: {[tuple(part.shape) for part in here]} on the CPU")
        if name in _COPIES:
            self._note_copy(name, args, kwargs, on_device)
        elif there and _waits(name, args, kwargs):
            self.waits[f"{_line()} {name}"] += 1
        elif mixed:
            self.waits[f"{_line()} {name} by an index on the CPU"] += 1
        if on_device and name not in _FREE:
            self.launches[name] += 1
        pinned = kwargs.get("pin_memory")
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        found = func(*_changed(_inner, args), **_changed(_inner, kwargs))
        if pinned:
            found.pinned = True
        if name in _COPIES and _leaves_late(name, args, kwargs, on_device):
            self.under_way.append((found, found.clone()))
            found.fill_(torch.nan if found.is_floating_point() else True)
        return self._outside(func, args, found, on_device)

    @staticmethod
    def _outside(func: Any, args: Any, found: Any, on_device: bool) -> Any:
        changed = func._schema.is_mutable and isinstance(found, Tensor) and args
        if changed and isinstance(args[0], Tensor) and found is _inner(args[0]):
            return args[0]
        return _changed(_outer, found) if on_device else found

    def _note_copy(self, name: str, args: Any, kwargs: Any, on_device: bool) -> None:
        source = args[1] if name == "copy_" else args[0]
        target = isinstance(args[0], OnDevice) if name == "copy_" else on_device
        late = _late(name, args, kwargs)
        if isinstance(source, OnDevice) and not target and not _leaves_late(name, args, kwargs, on_device):
            self.waits[f"{_line()} to the CPU"] += 1
        elif target and not isinstance(source, OnDevice) and not (late and _pinned("is_pinned", source)):
            self.waits[f"{_line()} from the CPU"] += 1


class _Event:
    """A place in the device's queue that the host may wait for."""

    def __init__(self, **_: Any) -> None:
        self._before: list[tuple[Tensor, Tensor]] = []

    def record(self, _: Any = None) -> None:
        self._before = list(_current().under_way)

    def synchronize(self) -> None:
        _current().waits[f"{_line()} an event"] += 1
        for host, numbers in self._before:
            host.copy_(numbers)
        arrived = {id(host) for host, _ in self._before}
        _current().under_way = [copy for copy in _current().under_way if id(copy[0]) not in arrived]


def _current() -> StandIn:
    assert StandIn.current is not None, "a tensor of the stand-in outlived it"
    return StandIn.current


def _tensor(make: Callable[..., Tensor], data: Any, *, device: Any = None, **given: Any) -> Tensor:
    made = make(data, **given)
    return made if device is None else made.to(device)


def _pinned(name: str, part: Tensor) -> Tensor | bool:
    """Pinned memory is ordinary memory with a mark."""
    if name == "is_pinned":
        return hasattr(part, "pinned")
    found = part.clone()
    found.pinned = True  # type: ignore[attr-defined]
    return found


def _late(name: str, args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))


def _leaves_late(name: str, args: Any, kwargs: Any, on_device: bool) -> bool:
    """Whether a copy goes to the host while that goes on: to pinned memory, which `to` makes by itself."""
    if not _late(name, args, kwargs):
        return False
    if name == "copy_":
        return isinstance(args[1], OnDevice) and hasattr(args[0], "pinned")
    return isinstance(args[0], OnDevice) and not on_device


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name in _INDEXED:
        masks = _leaves(args[1])
        return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in masks)
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in _WAITS


def _leaves(given: Any) -> Iterator[Any]:
    """What an operator is given, out of its lists; torch's own walk takes half of a test's time."""
    if isinstance(given, dict):
        given = given.values()
    elif not isinstance(given, (tuple, list)):
        yield given
        return
    for part in given:
        if isinstance(part, (tuple, list, dict)):
            yield from _leaves(part)
        else:
            yield part


def _changed(change: Callable[[Any], Any], given: Any) -> Any:
    """The same with each leaf changed."""
    if isinstance(given, dict):
        return {name: _changed(change, part) for name, part in given.items()}
    if isinstance(given, (tuple, list)):
        return type(given)([_changed(change, part) for part in given])
    return change(given)


def _inner(part: Any) -> Any:
    if isinstance(part, OnDevice):
        return part.inner
    return CPU if isinstance(part, torch.device) else part


def _outer(part: Any) -> Any:
    return OnDevice(part) if type(part) in (Tensor, nn.Parameter) else part


def _line() -> str:
    """The innermost line of our code that is being run."""
    for frame in _frames():
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in _OURS:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
    return "elsewhere"


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def moved(module: nn.Module) -> nn.Module:
    """`module.to("cuda")`, which would put new data under the old parameters."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(OnDevice(weight.detach()), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module
