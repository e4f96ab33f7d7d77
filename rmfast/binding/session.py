"""Running a model without leaving a trace: locks, replaced forwards, the rows that are read, clamped outputs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def lock_of(module: nn.Module) -> Any:
    """One re-entrant lock per model, kept outside of it so that the model can still be copied and pickled.

    Models that share modules (two heads on one body) share it: a session changes those.
    """
    with _locks_guard:
        lock = _locks.get(module)
        if lock is None:
            parts = list(module.modules())
            lock = next((_locks[part] for part in parts if part in _locks), None) or threading.RLock()
            for part in parts:
                _locks.setdefault(part, lock)
        return lock


def share_lock(module: nn.Module, copied: nn.Module) -> None:
    """One lock for a model and one made of its parts, whose configuration and submodules a session changes."""
    lock = lock_of(module)
    with _locks_guard:
        _locks[copied] = lock


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Gives a module another forward, for this thread."""
    own = module.__dict__.get("forward")  # accelerate and kernel libraries set one on the instance
    original, thread = module.forward, threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return (forward if threading.get_ident() == thread else original)(*args, **kwargs)

    call.instead_of = getattr(own, "instead_of", own)  # type: ignore[attr-defined]
    module.forward = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


@contextmanager
def passing_through(norm: nn.Module | None) -> Iterator[None]:
    """Makes the norm give back what it is given while the body runs once: no normalised copy of all the tokens is
    written.

    Raises:
        ValueError: the body ran without it, so that its states are not those before the norm.
    """
    assert norm is not None
    called = False

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal called
        called = True
        return x

    with replaced_forward(norm, forward):
        yield
    if not called:
        raise ValueError(
            f"Expected the final norm ({type(norm).__name__}) to be what the body's run ends in, as when the model was "
            "bound; it is not run any more: make a new RewardModel of the model"
        )


@contextmanager
def eval_mode(root: nn.Module) -> Iterator[None]:
    """No dropout; every module's own mode is put back at the end, also after an error.

    The mode is the modules' and not a thread's: until then a forward in another thread has no dropout either.
    """
    training = [module for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@dataclass
class _Reads:
    total: int  # rows of the run
    rows: Tensor | None  # those that are read; None: all
    seen: set[str] = field(default_factory=set)  # modules whose outputs at these rows have come by


_reads: ContextVar[_Reads | None] = ContextVar("rmfast_reads", default=None)


@contextmanager
def reading(total: int, rows: Tensor | None) -> Iterator[None]:
    """Says for one run of the body which of its rows (flat, (m,) int64; None: all) are read."""
    token = _reads.set(_Reads(total, rows))
    try:
        yield
    finally:
        _reads.reset(token)


def rows_read() -> Tensor | None:
    """The flat rows (m,) of the body's run that are read; None: all."""
    reads = _reads.get()
    return None if reads is None else reads.rows


def read_rows(name: str, out: Tensor) -> Tensor | slice | None:
    """Where the rows that are read are in a module's output, flat (r, m); None where it is not of the tokens."""
    reads = _reads.get()
    if reads is None:
        raise ValueError(f"Expected a run that says which tokens are read, for {name} to be clamped there alone")
    if name in reads.seen:  # DeBERTa projects its relative positions by the same module, after the tokens
        return None
    reads.seen.add(name)
    count = out.numel() // out.size(-1)
    if count == reads.total:
        return slice(None) if reads.rows is None else reads.rows.to(out.device)
    if reads.rows is not None and count == reads.rows.numel():
        return slice(None)  # the last layer, which need not run others
    raise ValueError(
        f'Expected {name} to give a row for each of {reads.total} tokens, got {count}: a clamp with positions="last" '
        'can\'t tell which of them is read; positions="all" needs not'
    )


@dataclass(frozen=True, eq=False)
class Clamp:
    """Output channels of a module that are set to values while the model runs: (j,) int64 and (j,).

    Attributes:
        last: only at the rows that are read (`reading`), not at all.
    """

    name: str
    indices: Tensor
    values: Tensor
    last: bool


@contextmanager
def with_clamps(root: nn.Module, clamps: tuple[Clamp, ...]) -> Iterator[None]:
    """Runs the clamped modules with their outputs set."""
    by_name: dict[str, list[Clamp]] = {}
    for clamp in clamps:
        by_name.setdefault(clamp.name, []).append(clamp)
    with ExitStack() as stack:
        for name, some in by_name.items():
            module = root.get_submodule(name)
            stack.enter_context(replaced_forward(module, _setting(name, module.forward, some)))
        yield


def _setting(name: str, original: Callable, clamps: list[Clamp]) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out = out.clone() if out.requires_grad else out.contiguous()
        for clamp in clamps:
            at, values = clamp.indices.to(out.device), clamp.values.to(out)
            if not clamp.last:
                out[..., at] = values
                continue
            rows = read_rows(name, out)
            if isinstance(rows, slice):
                out[..., at] = values
            elif rows is not None:
                out.view(-1, out.size(-1))[rows[:, None], at] = values
        return out

    return forward
