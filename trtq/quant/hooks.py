"""Forward hooks that are removed when their block ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["captured_outputs", "input_hooks", "output_hooks"]


@contextmanager
def input_hooks(
    modules: Mapping[str, nn.Module], hook: Callable[[str, tuple[Any, ...]], Any]
) -> Iterator[None]:
    """Inside the block, call `hook(name, inputs)` before each call of a module.

    Args:
        modules: the observed modules by name.
        hook: callback with the module's name and its positional arguments; a result other than None
            replaces the arguments.
    """

    def before(name: str) -> Callable[..., Any]:
        return lambda _, inputs: hook(name, inputs)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(before(name)).remove)
        yield


@contextmanager
def output_hooks(
    modules: Mapping[str, nn.Module], hook: Callable[[str, tuple[Any, ...], Any], None]
) -> Iterator[None]:
    """Inside the block, call `hook(name, inputs, output)` after each call of a module.

    Args:
        modules: the observed modules by name.
        hook: callback with the module's name, its positional arguments and its result.
    """

    def after(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: hook(name, inputs, output)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(after(name)).remove)
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
