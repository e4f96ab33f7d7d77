"""Turning it on and off: what is replaced in reward-lens, put back, and counted."""

from __future__ import annotations

import functools
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from rmfast.integrations.reward_lens import activation_patcher, forward_cache, head_inputs, patch_grid
from rmfast.integrations.reward_lens.theirs import Outside, installed_version, submodule

SUPPORTED = ("2.0.1", "3.1.0")

_guard = threading.RLock()
_depth = 0
_replaced: list[tuple[Any, str, Any]] = []  # owner, attribute, what it was
_calls: Counter[tuple[str, str]] = Counter()  # (what, why reward-lens' own code ran; "" where it did not)


class _Enabled:
    """Leaving it turns the integration off again."""

    def __enter__(self) -> _Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        disable()


def enable() -> _Enabled:
    """Run reward-lens' calls on rmfast's engines, in this process and from now on, for models wrapped before as well.

    Calls may be nested: the same number of `disable()` turns it off. As a context manager it is off at the end:

        with rmfast.integrations.reward_lens.enable():
            evidence = PatchGrid("head").measure(context)

    Raises:
        ImportError: reward-lens is not installed, or is a version that lacks what is replaced. One that is not in
            SUPPORTED but has it all is a warning.
    """
    global _depth
    with _guard:
        if _depth == 0:
            replacements = _replacements()
            _calls.clear()
            for owner, name, new in replacements:
                _replaced.append((owner, name, vars(owner)[name]))
                setattr(owner, name, new)
        _depth += 1
    return _Enabled()


def disable() -> None:
    """Undo one `enable()`; with the last one every attribute of reward-lens is what it was. Nothing where it is off."""
    global _depth
    with _guard:
        _depth = max(0, _depth - 1)
        while _depth == 0 and _replaced:
            setattr(*_replaced.pop())


def explain() -> str:
    """Whether it is on, and for each replaced call how often it ran here, or as reward-lens' own code and why."""
    lines = [f"reward-lens on rmfast: {'on' if _depth else 'off'}"]
    for (what, why), count in sorted(_calls.items()):
        lines.append(f"{what}: {count} × {f'reward-lens itself ({why})' if why else 'rmfast'}")
    return "\n".join(lines)


def _replacements() -> list[tuple[Any, str, Any]]:
    version = installed_version()
    hf, patch = submodule("runtime.hf"), submodule("measure.battery.patch")
    names: dict[Any, dict[str, Callable[..., Any]]] = {
        hf.HFRuntime: {
            "final_head_inputs": head_inputs.final_head_inputs,
            "full_head_inputs": head_inputs.full_head_inputs,
        },
        patch.PatchGrid: {"measure": patch_grid.measure},
        submodule("model").RewardModel: {
            "_forward_with_cache_from_inputs": forward_cache.cached,
            "_forward_with_cache_batch_from_inputs": forward_cache.cached_batch,
        },
    }
    if version.startswith("2."):
        names[submodule("patching").ActivationPatcher] = {
            "patch_all_components": activation_patcher.patch_all_components,
            "patch_all_components_mean": activation_patcher.patch_all_components_mean,
            "patch_all_heads": activation_patcher.patch_all_heads,
        }
    lacking = [f"{owner.__name__}.{name}" for owner in names for name in names[owner] if name not in vars(owner)]
    known = f"versions {' and '.join(SUPPORTED)}"
    if lacking:
        raise ImportError(f"reward-lens {version} has no {', '.join(lacking)}: rmfast knows {known}")
    if version not in SUPPORTED:
        warnings.warn(f"reward-lens {version} is not among the {known} that rmfast is tested with", stacklevel=3)
    made: list[tuple[Any, str, Any]] = [
        (owner, name, _or_itself(f"{owner.__name__}.{name}", vars(owner)[name], ours))
        for owner, each in names.items()
        for name, ours in each.items()
    ]
    return [*made, (patch, "run_patched_scores", patch_grid.known_or(patch.run_patched_scores))]


def _or_itself(what: str, original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs ours(original, self, ...), and the original where the call is outside of what ours does."""

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = ours(original, self, *args, **kwargs)
        except Outside as why:
            _calls[what, str(why)] += 1
            return original(self, *args, **kwargs)
        _calls[what, ""] += 1
        return result

    return call
