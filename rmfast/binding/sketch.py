"""A first binding of a model that has just been loaded, found with one of its layers in place of all of them.

Parts, head and reading rule do not depend on what the layers compute, and a run of all of them reads every weight: of
SmolLM2-135M two such runs take half as long as transformers takes to load it. What the layers decide (whether later
tokens are seen, whether activations are finite) is for `rmfast.binding.find.bind`, before the first reward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from rmfast.binding.binding import Binding
from rmfast.binding.find import bind
from rmfast.binding.modules import is_untouched, text_config, unwrap
from rmfast.binding.session import lock_of, replaced_forward


def sketch(model: nn.Module, pooling: str | int = "auto", avoid: tuple[int, ...] = ()) -> Binding | None:
    """What `bind` finds with the first layer alone; None where that does not tell.

    Args: as for `rmfast.binding.find.bind`.
    """
    root = unwrap(model)
    layers = _layers(root)
    if layers is None:
        return None
    try:
        with lock_of(root), _first_alone(layers):
            bound = bind(model, pooling, avoid)
    except Exception:  # a layer that wants what others give, or a model that is refused: the whole one tells which
        return None
    return bound if bound.head_names else None


def _layers(root: nn.Module) -> list[nn.Module] | None:
    """The only list of as many different, untouched layers as the configuration has."""
    count = getattr(text_config(root), "num_hidden_layers", None)
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    layers = list(lists[0]) if len(lists) == 1 else []
    return layers if len(set(layers)) == count and all(map(is_untouched, layers)) else None


@contextmanager
def _first_alone(layers: list[nn.Module]) -> Iterator[None]:
    """Makes all layers but the first give back the states that they are given, in the form of its output."""
    first, *others = layers
    forward, made = first.forward, None

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made = forward(*args, **kwargs)
        return made

    def same(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return states if isinstance(made, Tensor) else (states, *made[1:])  # type: ignore[index]

    with ExitStack() as stack:
        stack.enter_context(replaced_forward(first, run))
        for layer in others:
            stack.enter_context(replaced_forward(layer, same))
        yield
