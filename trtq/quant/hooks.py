"""Forward hooks that are removed when their block ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["captured_outputs", "input_hooks", "output_hooks"]


class _Inputs:
    """The tensors among the arguments of a module's calls, in the order of its parameters.

    Args:
        module: module that is called.
    """

    def __init__(self, module: nn.Module) -> None:
        names = inspect.signature(module.forward).parameters
        self._order = {name: place for place, name in enumerate(names)}

    def _keys(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int | str]:
        """Places and names of the tensors; arguments by place come before arguments by name."""
        places: list[int | str] = [
            place for place, value in enumerate(args) if isinstance(value, Tensor)
        ]
        names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        return [*places, *sorted(names, key=lambda name: self._order.get(name, len(self._order)))]

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The tensors of one call."""
        keys = self._keys(args, kwargs)
        return tuple(args[key] if isinstance(key, int) else kwargs[key] for key in keys)

    def replaced(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one call with other tensors in the places of those of `tensors`."""
        new_args, new_kwargs = list(args), dict(kwargs)
        for key, tensor in zip(self._keys(args, kwargs), tensors, strict=True):
            if isinstance(key, int):
                new_args[key] = tensor
            else:
                new_kwargs[key] = tensor
        return tuple(new_args), new_kwargs


@contextmanager
def input_hooks(
    modules: Mapping[str, nn.Module], hook: Callable[[str, tuple[Any, ...]], Any]
) -> Iterator[None]:
    """Inside the block, call `hook(name, inputs)` before each call of a module.

    Args:
        modules: the observed modules by name.
        hook: callback with the module's name and the tensors among its arguments, in the order of its
            parameters, whether they are given by place or by name. A result other than None replaces
            the tensors: a tuple with one tensor for each, or one tensor.
    """

    def before(name: str, module: nn.Module) -> Callable[..., Any]:
        inputs = _Inputs(module)

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = hook(name, inputs.tensors(args, kwargs))
            if result is None:
                return None
            tensors = result if isinstance(result, tuple) else (result,)
            return inputs.replaced(args, kwargs, tensors)

        return call

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(before(name, module), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def output_hooks(
    modules: Mapping[str, nn.Module], hook: Callable[[str, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Inside the block, call `hook(name, inputs, output)` after each call of a module.

    Args:
        modules: the observed modules by name.
        hook: callback with the module's name, the tensors among its arguments as in `input_hooks`, and
            its result.
    """

    def after(name: str, module: nn.Module) -> Callable[..., None]:
        inputs = _Inputs(module)
        return lambda _, args, kwargs, output: hook(name, inputs.tensors(args, kwargs), output)

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(after(name, module), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def captured_outputs(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the last output of each named module, in the order of the calls.

    Args:
        model: model that contains the modules.
        names: module paths; paths that do not exist in the model are ignored.

    Yields:
        The outputs by path, which the block's calls fill in.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _: tuple[Any, ...], output: Tensor) -> None:
        outputs[name] = output

    modules = {name: module for name, module in model.named_modules() if name in names}
    with output_hooks(modules, keep):
        yield outputs
