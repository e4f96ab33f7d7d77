"""SIGTERM, by which a scheduler takes a machine back: a run ends what it is at, and exits so that it can go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(BaseException):
    """The process was told to end (SIGTERM). Like KeyboardInterrupt no Exception, which something might handle."""


class Termination:
    """While it is entered, SIGTERM raises `Terminated`: at once, or at the end of what is `finishing`.

    A second SIGTERM does not wait. Only Python's main thread has signals; elsewhere nothing changes.
    """

    def __init__(self) -> None:
        self._waits = self._told = False
        self._before: Any = None
        self._has_signals = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Termination:
        if self._has_signals:
            self._before = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *error: object) -> None:
        if self._has_signals:
            signal.signal(signal.SIGTERM, self._before)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """What is entered here is not interrupted by a first SIGTERM, which acts when it is left."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self._told:
            raise Terminated

    def _terminate(self, *_: object) -> None:
        if self._waits and not self._told:
            self._told = True
        else:
            raise Terminated
