"""One source on several devices: a module is copied once for each device; a function must not use tensors of one device."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from aiotrt.devices.base import Device
from aiotrt.errors import EngineError

__all__ = ["check_free", "replicas"]

#: How deep nested containers and objects, and functions that call each other, are searched for tensors.
DEPTH: Final = 3


def replicas(source: object, devices: Sequence[Device]) -> list[object]:
    """Return the source for each device.

    A module that is on one of the devices is used there itself. Each other device gets a copy with bit-identical weights.
    The original is not moved, and later changes of its weights do not affect the copies.

    Args:
        source: a file, a module, an exported program or a function.
        devices: the devices, at least one.

    Raises:
        EngineError: a module cannot be copied, or a function uses tensors of one device.
    """
    places = [device.torch_device for device in devices]
    if isinstance(source, (torch.nn.Module, torch.export.ExportedProgram)):
        made: dict[torch.device, object] = {}
        for place in places:
            if place not in made:
                made[place] = _module(source, place) if isinstance(source, torch.nn.Module) else _program(source, place)
        return [made[place] for place in places]
    if callable(source):
        check_free(str(getattr(source, "__name__", type(source).__name__)), source, devices)
    return [source] * len(devices)


def check_free(name: str, function: object, devices: Sequence[Device]) -> None:
    """Check that a function can run on each device, because it uses no tensor or module of only one of them.

    Args:
        name: the function's name in the message.
        function: the function.
        devices: the devices that will run it.

    Raises:
        EngineError: the function uses such a tensor or module.
    """
    places = {device.torch_device for device in devices}
    for what, value in _used(function):
        for tensor in _tensors(value):
            if places != {tensor.device} and (
                tensor.dim() or tensor.device.type != "cpu"
            ):  # torch passes a host scalar to any device
                raise EngineError(
                    f"{name} uses {what}, which is on {tensor.device}, and the model runs on "
                    f"{', '.join(sorted(map(str, places)))}: make a torch module of it, with {what} as a parameter or "
                    "buffer, so that each device gets a copy"
                )


def _module(module: torch.nn.Module, place: torch.device) -> torch.nn.Module:
    name = type(module).__name__
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for part, submodule in module.named_modules():
        for attribute, value in vars(submodule).items():
            if isinstance(value, torch.Tensor) and value.device.type != "cpu" and value.device != place:
                what = f"{part}.{attribute}" if part else attribute
                raise EngineError(
                    f"{name} cannot run on {place}: {what} is a tensor on {value.device}, and neither a parameter "
                    "nor a buffer; register it with register_buffer()"
                )
    found = {tensor.device for tensor in tensors.values()}
    if found <= {place}:
        return module
    if len(found) > 1:
        listing = ", ".join(sorted(map(str, found)))
        raise EngineError(f"{name} has parameters and buffers on {listing}, and is not copied: move it to one device first")
    try:
        # deepcopy takes the moved weights from `memo`, so the module's own device never holds a second copy of them.
        memo: dict[int, object] = {id(tensor): _moved(tensor, place) for tensor in tensors.values()}
        return copy.deepcopy(module, memo).to(place)
    except Exception as error:
        raise EngineError(
            f"{name} cannot be copied to {place} ({type(error).__name__}: {error}): load it from a file, or load a "
            "model for each device"
        ) from error


def _moved(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(place)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(moved, requires_grad=tensor.requires_grad)
    return moved


def _program(program: torch.export.ExportedProgram, place: torch.device) -> torch.export.ExportedProgram:
    found = {tensor.device for tensor in (*program.state_dict.values(), *program.constants.values()) if _is_tensor(tensor)}
    if found <= {place}:
        return program
    try:
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(copy.deepcopy(program), place)
    except Exception as error:
        raise EngineError(
            f"ExportedProgram: it was exported on {', '.join(sorted(map(str, found)))} and cannot be moved to {place} "
            f"({type(error).__name__}: {error}): export the module on each device, or load the module itself"
        ) from error


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _used(function: object, depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield the name and value of each object that a function uses besides its arguments."""
    if isinstance(function, functools.partial):
        for i, value in enumerate(function.args):
            yield f"argument {i}", value
        yield from function.keywords.items()
        yield from _used(function.func, depth)
        return
    owner = getattr(function, "__self__", None)
    if owner is not None:
        yield "self", owner
    target: Any = inspect.unwrap(function) if callable(function) else function
    target = getattr(target, "__func__", target)
    if not inspect.isfunction(target):
        if not isinstance(function, torch.nn.Module) and hasattr(function, "__dict__"):
            yield from vars(function).items()
        return
    names = inspect.getclosurevars(target)
    for name, value in (*names.nonlocals.items(), *names.globals.items()):
        if inspect.isfunction(value) and depth < DEPTH:
            yield from _used(value, depth + 1)
        elif not inspect.ismodule(value):
            yield name, value
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.default is not parameter.empty:
            yield name, parameter.default


def _tensors(value: object, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif depth < DEPTH and isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one, depth + 1)
    elif depth < DEPTH and isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one, depth + 1)
    elif depth < DEPTH and type(value).__module__ not in ("builtins", "torch") and hasattr(value, "__dict__"):
        for one in vars(value).values() if not inspect.isclass(value) else ():
            yield from _tensors(one, depth + 1)
