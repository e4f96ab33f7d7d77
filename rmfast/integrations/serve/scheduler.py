"""Continuous batching: requests of all connections wait in one queue, from which one thread runs batch after batch."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

from rmfast.integrations.serve.refusals import Busy, Closed, Refused, TooLarge, Unscored
from rmfast.integrations.serve.waiting import Piece, Waiting
from rmfast.integrations.serve.work import PLAIN, Encoding, Work, finite, options_of

# Of the running mean of a text's seconds, the weight of the newest batch.
_NEWEST = 0.2
# Characters of a request that are tokenised in one go: others come between, and a refused text is the last of its own.
_SLICE = 1 << 18
# Rows of a batch where the model can't say.
_BUDGET = 3072


@dataclass(eq=False)
class Ask:
    """One request.

    Attributes:
        characters: of all inputs. A request of many is tokenised a part at a time.
        future: gets a `Done`, or one of `refusals`. Who cancels it has the texts that still wait dropped.
    """

    work: Work
    inputs: list[Any]
    encoding: Encoding = PLAIN
    characters: int = 0
    future: Future[Done] = field(default_factory=Future)
    results: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    left: int = 0
    arrived: float = field(default_factory=time.monotonic)

    @property
    def dropped(self) -> bool:
        return self.future.done()

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):  # it was cancelled, or has failed by another of its texts
            self.future.set_exception(error)

    def finish(self) -> None:
        with suppress(InvalidStateError):
            self.future.set_result(Done(self.results, self.items))


@dataclass(frozen=True)
class Done:
    """The numbers of each input, and the inputs as they were read (`Encoded`)."""

    results: list[Any]
    items: list[Any]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.items))


class Scheduler:
    """The queue of one model, and the thread that runs it.

    A batch is what waits, the oldest first and with it what shares its beginning, up to `batch_tokens` rows. While one
    runs, the next gathers. A text that finds the thread idle waits at most `max_wait` seconds for company.

    Args:
        rm: a `rmfast.RewardModel`, whose own methods run every batch: results are theirs to the bit.
        batch_tokens: rows of a batch; default what the model takes at once.
        max_wait: seconds.
        queue: most texts that were asked for and have no answer yet; `submit` raises Busy beyond.
        tokens: most tokens of one request.
        encoding: options of `RewardModel.encode` where a request has none of its own.
        batched: told of each batch its work's name, texts, tokens and seconds.
    """

    def __init__(
        self, rm: Any, *, batch_tokens: int | None = None, max_wait: float = 0.005, queue: int = 16384,
        tokens: int = 1 << 20, encoding: dict[str, Any] | None = None,
        batched: Callable[[str, int, int, float], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        self.rm, self.max_wait, self.queue, self.tokens = rm, max_wait, queue, tokens
        self._encoding, self._batched, self._given = encoding or {}, batched, batch_tokens
        self._changed = threading.Condition()
        self._inbox: dict[Future[Done], Ask] = {}  # as they came
        self._long: list[Ask] = []  # of which a part is read
        self._asked = 0  # texts without an answer
        self._closing = False
        self._waiting: dict[Work, Waiting] = {}
        self._running: list[Piece] = []
        self._budget = batch_tokens or _BUDGET
        self._seconds = 0.01  # of a text, a running mean
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._live,), name="rmfast-scheduler", daemon=True
        )  # in the context of who made it: `rmfast.backend`
        self._thread.start()

    @property
    def asked(self) -> int:
        """Texts without an answer."""
        return self._asked

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, ask: Ask) -> Future[Done]:
        """Queue a request, from any thread.

        Raises:
            Busy: the queue is full.
            Closed: `close` was called, or the thread has ended.
        """
        count = len(ask.inputs)
        with self._changed:
            if self._closing or not self.alive:
                raise Closed()
            if count > self.queue:
                raise TooLarge(f"the request has {count} texts, and the queue holds {self.queue}")
            if self._asked + count > self.queue:
                raise Busy(self._asked, min(60, max(1, math.ceil(self._asked * self._seconds))))
            self._asked += count
            self._inbox[ask.future] = ask
            self._changed.notify()
        ask.future.add_done_callback(lambda future: self._answered(future, count))
        return ask.future

    def close(self, timeout: float | None = None) -> bool:
        """Take no more requests, and run what waits. False where that takes longer than `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self.alive

    def _answered(self, future: Future[Done], count: int) -> None:
        with self._changed:
            self._asked -= count
            self._inbox.pop(future, None)  # it was cancelled: what counts no more holds no memory

    def _live(self) -> None:
        try:
            while self._gather():
                if (batch := self._next()) is not None:
                    self._run(*batch)
        finally:  # by an error that no request has, such as one of the interpreter: nobody may wait for ever
            with self._changed:
                self._closing = True
                asks = [*self._inbox.values(), *self._long]
            left = [*self._running, *(piece for each in self._waiting.values() for piece in each)]
            for ask in [*asks, *(piece.owner for piece in left)]:
                ask.fail(Closed())

    def _gather(self) -> bool:
        """Wait until there is something to run, and read it; False once the scheduler is closed and empty."""
        self._running = []
        self._budget = self._rows()
        until = 0.0 if any(self._waiting.values()) else None  # of waiting; None: until there is something
        while True:
            with self._changed:
                while not (self._inbox or self._long or self._closing) and (until is None or until > time.monotonic()):
                    self._changed.wait(None if until is None else until - time.monotonic())
                asks, closing = list(self._inbox.values()), self._closing
                self._inbox.clear()
            if until is None:
                until = time.monotonic() + self.max_wait
            self._read([ask for ask in asks if ask.characters <= _SLICE])
            self._long += [ask for ask in asks if ask.characters > _SLICE]
            self._read_on()
            full = any(each.tokens >= self._budget for each in self._waiting.values())
            if full or closing or until <= time.monotonic():
                return not closing or any(self._waiting.values()) or bool(asks) or bool(self._long)

    def _rows(self) -> int:
        if self._given is not None:
            return self._given
        try:
            engine = self.rm.packed_engine()
            return self.rm.default_batch_tokens(None if isinstance(engine, str) else engine)
        except Exception:  # the run says what is wrong with the model, to those who asked for it
            return _BUDGET

    def _read(self, asks: list[Ask]) -> None:
        """Token ids of requests that have arrived, those of one kind in one call of the tokenizer."""
        groups: dict[tuple[Work, Encoding], list[Ask]] = {}
        for ask in asks:
            if not ask.dropped:
                groups.setdefault((ask.work, ask.encoding), []).append(ask)
        for (work, encoding), group in groups.items():
            try:
                read = self._encoded(work, encoding, group)
            except Exception:  # of one of them
                for ask in group:
                    try:
                        self._admit(ask, self._encoded(work, encoding, [ask]))
                    except Exception as error:
                        ask.fail(_refusal(error))
                continue
            for ask in group:
                self._admit(ask, read[: len(ask.inputs)])
                del read[: len(ask.inputs)]

    def _read_on(self) -> None:
        """A part of the long request whose turn it is."""
        self._long = [ask for ask in self._long if not ask.dropped]
        if not self._long:
            return
        ask = self._long[0]
        start, count = len(ask.items), max(1, len(ask.inputs) * _SLICE // ask.characters)
        try:
            ask.items += self._tokenised(ask.work, ask.encoding, ask.inputs[start : start + count])
        except Exception as error:
            ask.fail(_refusal(error))
        self._long = self._long[1:]
        if ask.dropped:
            return
        if len(ask.items) == len(ask.inputs) or any(isinstance(item, Exception) for item in ask.items[start:]):
            self._admit(ask, ask.items)
        else:
            self._long.append(ask)

    def _encoded(self, work: Work, encoding: Encoding, asks: list[Ask]) -> list[Any]:
        return self._tokenised(work, encoding, [each for ask in asks for each in ask.inputs])

    def _tokenised(self, work: Work, encoding: Encoding, inputs: list[Any]) -> list[Any]:
        return work.encode(self.rm, inputs, options_of(self.rm, encoding, self._encoding))

    def _admit(self, ask: Ask, items: list[Any]) -> None:
        for place, item in enumerate(items):
            if isinstance(item, Exception):
                return ask.fail(Refused(f"input {place}: {getattr(item, 'reason', item)}"))
        if (count := sum(map(len, items))) > self.tokens:
            return ask.fail(TooLarge(f"the request has {count} tokens, over the limit of {self.tokens}"))
        ask.items, ask.left, ask.results = items, len(items), [None] * len(items)
        if not items:
            return ask.finish()
        waiting = self._waiting.setdefault(ask.work, Waiting())
        for place, item in enumerate(items):
            waiting.add(Piece(ask, place, item))

    def _next(self) -> tuple[Work, list[Piece]] | None:
        """The next batch, of the work whose oldest text has waited longest."""
        ages = {work: piece.owner.arrived for work, each in self._waiting.items() if (piece := each.oldest())}
        for work in [work for work in self._waiting if work not in ages]:
            del self._waiting[work]
        if not ages:
            return None
        work = min(ages, key=ages.__getitem__)
        self._running = self._waiting[work].take(self._budget)
        return work, self._running

    def _run(self, work: Work, pieces: list[Piece]) -> None:
        """Run a batch. An error is that of the requests it is of, and no other's."""
        start = time.monotonic()
        while pieces := [piece for piece in pieces if not piece.owner.dropped]:
            try:
                results = work.run(self.rm, [piece.item for piece in pieces])
            except Exception as error:
                at = getattr(error, "index", None)
                if isinstance(at, int) and 0 <= at < len(pieces):  # what `encode` can't foresee: no token to read
                    piece = pieces[at]
                    piece.owner.fail(Refused(f"input {piece.place}: {getattr(error, 'reason', error)}"))
                elif len({id(piece.owner) for piece in pieces}) == 1:
                    pieces[0].owner.fail(_refusal(error))
                else:
                    owners: dict[int, list[Piece]] = {}
                    for piece in pieces:
                        owners.setdefault(id(piece.owner), []).append(piece)
                    for own in owners.values():
                        self._run(work, own)
                    return
                continue
            seconds = time.monotonic() - start
            self._seconds += _NEWEST * (seconds / len(pieces) - self._seconds)
            self._batched(work.name, len(pieces), sum(map(len, pieces)), seconds)
            for piece, result in zip(pieces, results, strict=True):
                _deliver(piece, result)
            return


def _deliver(piece: Piece, result: Any) -> None:
    ask = piece.owner
    if not finite(result):
        return ask.fail(Unscored(f"the {ask.work.name} of input {piece.place} is not finite"))
    ask.results[piece.place] = result
    ask.left -= 1
    if not ask.left:
        ask.finish()


def _refusal(error: Exception) -> Exception:
    """What a request is told of an error: of its arguments all, of others nothing but that there was one."""
    if isinstance(error, ValueError | TypeError):
        return Refused(str(error))
    return Unscored("the model could not run it", error)
