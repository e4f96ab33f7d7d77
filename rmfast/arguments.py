"""Checks of arguments, one for each kind: what is right comes back in plain Python, all else is refused by its name.

A bool is no number here, a float no int and a text no sequence, so that nothing is cut, or read as something else:
TypeError for another type, ValueError for a value out of range.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: Any) -> str:
    """A value in an error: short, whatever it is."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{'an array' if isinstance(value, np.ndarray) else 'a tensor'} of shape {tuple(value.shape)}"
    return _short.repr(value)


def is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """An int of Python's or NumPy's."""
    if least is None and most is None:
        expected = "an int"
    elif most is None:
        expected = "a positive int" if least == 1 else f"an int of at least {least}"
    else:
        expected = f"an int from {least} to {most}"
    if not is_whole(value):
        raise TypeError(f"Expected {name} to be {expected}, got {shown(value)}")
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"Expected {name} to be {expected}, got {shown(value)}")
    return int(value)


def number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, *, above: bool = False, below: bool = False
) -> float:
    """A finite number; `above` and `below` leave the ends out."""
    expected = "a finite number"
    if math.isfinite(least):
        low = f"{'above' if above else 'of at least'} {least:g}"
        both = f"in {'(' if above else '['}{least:g}, {most:g}{')' if below else ']'}"
        expected += f" {both if math.isfinite(most) else low}"
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"Expected {name} to be {expected}, got {shown(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    outside = found < least or found > most or (above and found == least) or (below and found == most)
    if not math.isfinite(found) or outside:
        raise ValueError(f"Expected {name} to be {expected}, got {shown(value)}")
    return found


def word(name: str, value: Any, known: Collection[str]) -> str:
    """One of some words."""
    if not isinstance(value, str) or value not in known:
        expected = " or ".join(f'"{each}"' for each in known) if len(known) == 2 else f"one of {', '.join(known)}"
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"Expected {name} to be {expected}, got {shown(value)}")
    return str(value)


def words(name: str, value: Any, known: Collection[str]) -> list[str]:
    """One of some words, or several different ones."""
    found = [value] if isinstance(value, str) else sequence(name, value, "a word or several")
    if not found or any(not isinstance(each, str) or each not in known for each in found):
        raise ValueError(f"Expected {name} to be of {', '.join(known)}, got {shown(value)}")
    if len(set(found)) < len(found):
        raise ValueError(f"Expected {name} to be different ones, got {shown(value)}")
    return list(map(str, found))


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"Expected {name} to be True or False, got {shown(value)}")
    return bool(value)


def expect_dimension(name: str, value: Any) -> None:
    """TypeError for an array or tensor of no dimension, which only seems to have a length."""
    if getattr(value, "ndim", 1) == 0:
        raise TypeError(f"Expected {name} to be a sequence, got {shown(value)}")


def sequence(name: str, value: Any, of: str = "a sequence", length: int | None = None) -> list[Any]:
    """What holds things in an order, as a list: no text, no mapping, no set."""
    unfit = isinstance(value, str | bytes | bytearray | Mapping | Set) or not isinstance(value, Iterable)
    if unfit or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0) or getattr(value, "is_meta", False):
        raise TypeError(f"Expected {name} to be {of}, got {shown(value)}")
    found = value.tolist() if isinstance(value, Tensor | np.ndarray) and value.ndim == 1 else list(value)
    if length is not None and len(found) != length:
        raise ValueError(f"Expected {name} to be {of}, got {len(found)} of them")
    return found


def hashable(name: str, values: list[Any]) -> list[Hashable]:
    """Things that a mapping can have as keys."""
    for value in values:
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(f"Expected {name} to be hashable, got {shown(value)}") from error
    return values


def wholes(name: str, value: Any, length: int | None = None, **limits: int) -> list[int]:
    """A sequence of ints."""
    of = "a sequence of ints" if length is None else f"an int for each of {length} inputs"
    return [whole(name, each, **limits) for each in sequence(name, value, of, length)]


def indices(name: str, value: Any, count: int) -> list[int]:
    """One or several different ones of `count` things, negative ones from the end."""
    one = isinstance(value, int | np.integer | float)  # a float and a bool are refused by `whole`
    asked = [whole(name, each) for each in ([value] if one else sequence(name, value, "an int or a sequence of ints"))]
    if not asked:
        raise ValueError(f"Expected {name} to name at least one")
    for i in asked:
        if not -count <= i < count:
            raise ValueError(f"Expected {name} to be in [0, {count}), got {i}")
    found = [i % count for i in asked]
    if len(set(found)) < len(found):
        raise ValueError(f"Expected {name} to be different, got {shown(value)}")
    return found


def array(name: str, value: Any, *shape: int | str) -> np.ndarray:
    """Real numbers as float64 of a shape (a letter is any size; none is any shape)."""
    try:
        if _holds_bool(value) or getattr(value, "is_meta", False):
            raise TypeError(f"{type(value).__name__}")
        plain = value.detach().cpu() if isinstance(value, Tensor) else value
        plain = plain.double() if isinstance(plain, Tensor) and plain.is_floating_point() else plain
        found = np.asarray(plain)
        if found.dtype.kind not in "iuf" and found.size:
            raise TypeError(f"{found.dtype}")
        found = found.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"Expected {name} to be real numbers, got {shown(value)} ({error})") from error
    fits = found.ndim == len(shape) and all(isinstance(n, str) or n == m for n, m in zip(shape, found.shape))
    if shape and not fits:
        wanted = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"Expected {name} to be of shape ({wanted}), got {found.shape}")
    return found


def finite(name: str, value: Any, *shape: int | str) -> np.ndarray:
    """`array` without NaN and infinities."""
    found = array(name, value, *shape)
    if not np.isfinite(found).all():
        raise ValueError(f"Expected {name} to be finite, got {found[~np.isfinite(found)][0]}")
    return found


def _holds_bool(value: Any) -> bool:
    """Which NumPy would make numbers of where there are others beside them."""
    if isinstance(value, list | tuple):
        return any(map(_holds_bool, value))
    return isinstance(value, bool | np.bool_)


def instance(name: str, value: Any, kind: type[T], hint: str = "") -> T:
    if not isinstance(value, kind):
        raise TypeError(f"Expected {name} to be a {kind.__name__}{hint}, got {shown(value)}")
    return value


def function(name: str, value: Any, of: str) -> Callable[..., Any]:
    if not callable(value):
        raise TypeError(f"Expected {name} to be a function of {of}, got {shown(value)}")
    return value


def device(name: str, value: Any) -> torch.device:
    """A torch device, or what names one."""
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | torch.device):
            raise TypeError
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"Expected {name} to be a device of torch, got {shown(value)}") from None


def path(name: str, value: Any) -> Path:
    """A path that a file system can hold."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"Expected {name} to be a path, got {shown(value)}")
    text = os.fspath(value)
    try:
        if not isinstance(text, str) or not text or b"\0" in os.fsencode(text):
            raise ValueError
    except ValueError:  # UnicodeEncodeError too
        raise ValueError(f"Expected {name} to be a path, got {shown(value)}") from None
    return Path(text)
