"""Running a model without leaving a trace: locks, replaced forwards, the rows that are read, clamped outputs."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rmfast.binding.modules import modules_of

_Lock = tuple[int, Any]  # a re-entrant lock, behind its place in the order in which locks are taken
_locks: weakref.WeakKeyDictionary[nn.Module, _Lock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()
_numbers = itertools.count()


@contextmanager
def lock_of(module: nn.Module) -> Iterator[None]:
    """A model for one thread, which may take it again. Locks are kept outside of it: it can be copied and pickled.

    A module has one lock for life. Models that share modules (two heads on one body), which a session changes, wait for
    each other by the locks of these: looked up each time, since modules may have come to be shared, by models that have
    locks of their own.
    """
    with _locks_guard:
        parts = modules_of(module)
        locks = list(map(_locks.get, parts))
        found = {lock for lock in locks if lock is not None} or {(next(_numbers), threading.RLock())}
        if None in locks:
            for part in parts:
                _locks.setdefault(part, min(found))
    with ExitStack() as stack:
        for _, lock in sorted(found):
            stack.enter_context(lock)
        yield


def share_lock(module: nn.Module, copied: nn.Module) -> None:
    """The locks of a model for a copy of it that has its parts: its configuration, or weights."""
    with lock_of(module), _locks_guard:
        for part, made in zip(module.modules(), copied.modules()):
            _locks[made] = _locks[part]


def on_the_host() -> AbstractContextManager[Any]:
    """Makes tensors of no named device on the CPU, whatever torch's default device is."""
    return torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Gives a module another forward, for this thread, until the end; one that somebody else sets meanwhile stays."""
    own = module.__dict__.get("forward")  # accelerate and kernel libraries set one on the instance
    original, thread = module.forward, threading.get_ident()
    ended = False

    def call(*args: Any, **kwargs: Any) -> Any:
        return (original if ended or threading.get_ident() != thread else forward)(*args, **kwargs)

    call.instead_of = getattr(own, "instead_of", own)  # type: ignore[attr-defined]
    module.forward = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        ended = True
        if module.__dict__.get("forward") is call:
            if own is None:
                del module.forward
            else:
                module.forward = own  # type: ignore[method-assign]


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A forward hook that does nothing in other threads, which may run the model at the same time."""
    thread = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == thread else None

    return call


@contextmanager
def uncompiled_calls(model: nn.Module) -> Iterator[None]:
    """Sets aside what `model.compile()` made of its modules.

    Hooks of the probe would not run in it, and under a mode of torch functions (`rmfast.binding.compute.Fp32`) what
    Dynamo leaves half compiled, at its limit of recompilations, gives tensors of other shapes.
    """
    compiled = [module for module in modules_of(model) if module._compiled_call_impl is not None]
    impls = [module._compiled_call_impl for module in compiled]
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, impl in zip(compiled, impls):
            module._compiled_call_impl = impl


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
    training = [module for module in modules_of(root) if module.training]
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
