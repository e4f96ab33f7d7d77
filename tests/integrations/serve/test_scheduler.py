"""The queue: which texts run together and when, whose errors are whose, and how it ends."""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import wait
from types import SimpleNamespace

import numpy as np
import pytest

from rmfast.integrations.serve import scheduler as scheduler_
from rmfast.integrations.serve import waiting
from rmfast.integrations.serve.refusals import Busy, Closed, Refused, TooLarge, Unscored
from rmfast.integrations.serve.scheduler import Ask, Scheduler
from rmfast.integrations.serve.waiting import Piece, Waiting, common
from rmfast.texts.inputs import Encoded, InputError


def text(*ids):
    return Encoded(np.array(ids, dtype=np.int64))


class Model:
    """Rewards are sums of ids. Remembers its batches, each of which waits for `gate`; 13 can't run, 14 gives NaN."""

    def __init__(self):
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()

    def packed_engine(self):
        return "none"

    def default_batch_tokens(self, engine):
        return 100

    def encode(self, inputs, errors, **options):
        if any(item == "bug" for item in inputs):
            raise RuntimeError("secret")
        return [text(*item) if item else InputError(i, "it is empty") for i, item in enumerate(inputs)]

    def score(self, items, normalize=None):
        assert self.gate.wait(20)
        self.batches.append([tuple(item.ids.tolist()) for item in items])
        for i, item in enumerate(items):
            if 12 in item.ids:
                raise InputError(i, "no token to read")
            if 13 in item.ids:
                raise RuntimeError("secret")
        return np.array([np.nan if 14 in item.ids else item.ids.sum() for item in items], dtype=np.float32)


class Once:
    """Another work than score, by its name."""

    name = "once"

    def encode(self, rm, inputs, encoding):
        return rm.encode(inputs, "return")

    def run(self, rm, items):
        return rm.score(items).tolist()


class Plain(Once):
    name = "score"


WORK = Plain()


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def scheduler(model):
    made = Scheduler(model, max_wait=0.05, queue=100, tokens=1000)
    yield made
    model.gate.set()
    made.close(10)


def submit(scheduler, *inputs, work=WORK):
    return scheduler.submit(Ask(work, list(inputs)))


def held(model, scheduler):
    """The scheduler in the middle of a batch, until the gate opens."""
    model.gate.clear()
    first = submit(scheduler, [1])
    while len(scheduler._running) == 0:
        time.sleep(0.001)
    return first


def test_numbers_come_back_in_order_and_batches_wait_for_company(model, scheduler):
    futures = [submit(scheduler, [i], [i, 2]) for i in range(5)]
    assert [f.result(10).results for f in futures] == [[i, i + 2] for i in range(5)]
    assert len(model.batches) == 1 and scheduler.asked == 0


def test_a_full_budget_does_not_wait(model):
    scheduler = Scheduler(model, max_wait=30)
    futures = [submit(scheduler, [i] * 40) for i in range(3)]
    wait(futures, 10)
    assert all(f.done() for f in futures)
    assert scheduler.close(10)


def test_what_waits_while_a_batch_runs_is_grouped_by_prefix_under_the_budget(model, scheduler):
    held(model, scheduler)
    prompts = [[p] * 30 for p in (5, 6, 7)]
    futures = [submit(scheduler, [*prompts[i % 3], 8, i]) for i in range(12)]
    while scheduler._inbox:
        model.gate.set()
    wait(futures, 10)
    sizes = [len(batch) for batch in model.batches[1:]]
    assert sum(sizes) == 12 and sizes[0] == 8  # two prompts of 30 with 4 × 2, and of the third no part
    assert all(len({each[0] for each in batch}) == n for batch, n in zip(model.batches[1:], (2, 1)))


def test_equal_works_share_batches_and_others_do_not(model, scheduler):
    other = Once()
    futures = [submit(scheduler, [i], work=work) for i in range(3) for work in (WORK, other)]
    wait(futures, 10)
    assert sorted(map(len, model.batches)) == [3, 3]


def test_an_input_that_can_not_be_read_is_its_requests_error_alone(model, scheduler):
    bad, good = submit(scheduler, [1], []), submit(scheduler, [2])
    with pytest.raises(Refused, match="input 1: it is empty"):
        bad.result(10)
    assert good.result(10).results == [2]


def test_errors_of_a_run_are_those_of_their_requests_alone(model, scheduler):
    futures = [submit(scheduler, item) for item in ([1], [1, 12], [13], [14], [2])]
    with pytest.raises(Refused, match="input 0: no token to read"):
        futures[1].result(10)
    with pytest.raises(Unscored, match="could not run it"):
        futures[2].result(10)
    with pytest.raises(Unscored, match="not finite"):
        futures[3].result(10)
    assert futures[0].result(10).results == [1] and futures[4].result(10).results == [2]


def test_an_error_of_the_tokenizer_is_its_requests_alone(model, scheduler):
    bad, good = submit(scheduler, "bug"), submit(scheduler, [2])
    with pytest.raises(Unscored, match="could not run it"):
        bad.result(10)
    assert good.result(10).results == [2]


@pytest.fixture
def reads(model, monkeypatch):
    """What is tokenised together, a text at a time where a request is long."""
    monkeypatch.setattr(scheduler_, "_SLICE", 1)
    seen, encode = [], model.encode
    monkeypatch.setattr(
        model, "encode", lambda inputs, *args, **kw: seen.append(list(inputs)) or encode(inputs, *args, **kw)
    )
    return seen


def test_a_long_request_is_read_in_parts_with_others_between_them(model, scheduler, reads):
    first = held(model, scheduler)
    long = [scheduler.submit(Ask(WORK, [[i], [i, 2], [i, 3]], characters=3)) for i in (5, 6)]
    short = submit(scheduler, [7], [8])
    model.gate.set()
    assert first.result(10).results == [1] and short.result(10).results == [7, 8]
    assert [each.result(10).results for each in long] == [[5, 7, 8], [6, 8, 9]]
    assert reads[1:] == [[[7], [8]], [[5]], [[6]], [[5, 2]], [[6, 2]], [[5, 3]], [[6, 3]]]
    assert scheduler.asked == 0


def test_of_a_long_request_nothing_is_read_behind_what_refuses_it(model, scheduler, reads):
    bad = scheduler.submit(Ask(WORK, [[1], [], [2], [3]], characters=9))
    with pytest.raises(Refused, match="input 1: it is empty"):
        bad.result(10)
    broken = scheduler.submit(Ask(WORK, ["bug", [2]], characters=9))
    with pytest.raises(Unscored, match="could not run it"):
        broken.result(10)
    assert reads == [[[1]], [[]], ["bug"]]


def test_of_a_long_request_that_was_cancelled_no_more_is_read(model, scheduler, reads):
    held(model, scheduler)
    gone = scheduler.submit(Ask(WORK, [[1], [2]], characters=9))
    kept = scheduler.submit(Ask(WORK, [[3], [4]], characters=9))
    assert gone.cancel()
    model.gate.set()
    assert kept.result(10).results == [3, 4] and reads[1:] == [[[3]], [[4]]]


def test_close_answers_long_requests_too(model, scheduler, reads):
    held(model, scheduler)
    long = scheduler.submit(Ask(WORK, [[i] for i in range(5)], characters=9))
    threading.Timer(0.1, model.gate.set).start()
    assert scheduler.close(10) and long.result(0).results == list(range(5))


def test_what_was_cancelled_is_not_run(model, scheduler):
    held(model, scheduler)
    futures = [submit(scheduler, [i]) for i in range(5)]
    for future in futures[::2]:
        assert future.cancel()
    assert scheduler.asked == 3
    model.gate.set()
    assert [futures[i].result(10).results for i in (1, 3)] == [[1], [3]]
    assert [each for batch in model.batches[1:] for each in batch] == [(1,), (3,)]


def test_what_was_cancelled_holds_no_memory(model):
    scheduler = Scheduler(model, queue=10)
    held(model, scheduler)
    asks = []
    for i in range(100):
        ask = Ask(WORK, [[i]])
        asks.append(weakref.ref(ask))
        assert scheduler.submit(ask).cancel()
        del ask
    assert scheduler.asked == 1 and not any(ask() for ask in asks)
    model.gate.set()
    assert scheduler.close(10)


def test_a_full_queue_says_when_to_come_back_and_a_request_over_it_that_it_never_fits(model, scheduler):
    held(model, scheduler)
    submit(scheduler, *([i] for i in range(99)))
    with pytest.raises(Busy, match="100 texts wait") as busy:
        submit(scheduler, [1])
    assert 1 <= int(busy.value.headers["Retry-After"]) <= 60
    with pytest.raises(TooLarge, match="101 texts"):
        submit(scheduler, *([i] for i in range(101)))


def test_a_request_over_the_limit_of_tokens_is_refused(scheduler):
    with pytest.raises(TooLarge, match="1001 tokens"):
        submit(scheduler, [1] * 1001).result(10)


def test_close_answers_what_waits_and_takes_nothing_more(model, scheduler):
    first = held(model, scheduler)
    futures = [submit(scheduler, [i]) for i in range(5)]
    threading.Timer(0.1, model.gate.set).start()
    assert scheduler.close(10)
    assert first.done() and [f.result(0).results for f in futures] == [[i] for i in range(5)]
    with pytest.raises(Closed):
        submit(scheduler, [1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_died(model, scheduler):
    held(model, scheduler)
    others = [submit(scheduler, [i]) for i in range(3)]
    model.score = None  # not callable: an error of its request
    running = SimpleNamespace(name="dies", encode=WORK.encode, run=lambda *_: (_ for _ in ()).throw(SystemExit))
    dying = scheduler.submit(Ask(_Hashed(running), [[5]]))
    model.gate.set()
    for future in [*others, dying]:
        with pytest.raises((Closed, Unscored, Refused)):
            future.result(10)
    scheduler._thread.join(10)
    assert not scheduler.alive
    with pytest.raises(Closed):
        submit(scheduler, [1])


class _Hashed:
    def __init__(self, work):
        self.name, self.encode, self.run = work.name, work.encode, work.run


def piece(*ids, owner=None):
    return Piece(owner or SimpleNamespace(dropped=False), 0, text(*ids))


def waiting_of(*pieces):
    made = Waiting()
    for each in pieces:
        made.add(each)
    return made


def test_common_beginnings():
    for a, b, n in ((1, 2), (1, 3), 1), ((1, 2), (1, 2, 3), 2), ((1,), (2,), 0), ((1, 2), (1, 2), 2):
        assert common(np.array(a), np.array(b)) == n


def test_the_oldest_runs_first_with_its_group_however_long_it_is():
    long, other = piece(*[1] * 50), piece(2, 2)
    made = waiting_of(other, long, piece(2, 2, 3), piece(2, 2, 4))
    assert [len(each) for each in made.take(4)] == [2, 3, 3]
    assert made.take(4) == [long] and made.take(4) == [] and len(made) == made.tokens == 0


def test_equal_texts_are_each_taken_once():
    pieces = [piece(3, 3) for _ in range(5)]
    made = waiting_of(*pieces)
    assert set(made.take(100)) == set(pieces) and len(made) == 0


def test_a_batch_looks_at_no_more_texts_than_it_can_take(monkeypatch):
    looked = []
    monkeypatch.setattr(waiting, "common", lambda a, b: looked.append(1) or common(a, b))
    made = waiting_of(*(piece(*[7] * 10, i, 1) for i in range(3000)))
    assert len(made.take(100)) == 45  # 12, and 2 for each other
    assert len(looked) < 1000
    made = waiting_of(*(piece(1, 2, 3) for _ in range(3000)))
    assert len(made.take(100)) == 3000


def test_dropped_texts_are_never_taken():
    gone = SimpleNamespace(dropped=True)
    kept = piece(1, 2, 3)
    made = waiting_of(piece(1, 2, owner=gone), kept, piece(1, 2, 3, 4, owner=gone))
    assert made.take(100) == [kept]
    assert made.oldest() is None and len(made) == 0


def test_dropped_texts_hold_no_memory_behind_one_that_waits():
    owner = SimpleNamespace(dropped=False)
    made = waiting_of(piece(*[1] * 50), *(piece(2, i, owner=owner) for i in range(3)), piece(3))
    owner.dropped = True
    made.oldest()
    assert len(made) == len(made._by_age) == 2 and made.tokens == 51


def test_what_was_taken_is_not_walked_over(monkeypatch):
    made = waiting_of(*(piece(i, i) for i in range(3000)))
    looked = []
    monkeypatch.setattr(waiting, "common", lambda a, b: looked.append(1) or common(a, b))
    lines = []
    group = made._group
    monkeypatch.setattr(made, "_group", lambda *given: lines.append(len(made)) or group(*given))
    assert len(made.take(6000)) == 3000 and len(looked) < 6000
    assert lines == list(range(3000, 0, -1))  # a group sees what still waits, and nothing else


def test_every_text_is_taken_once_whatever_waits():
    rng = np.random.default_rng(0)
    pieces = [piece(*rng.integers(0, 3, rng.integers(1, 12))) for _ in range(500)]
    made = waiting_of(*pieces)
    taken = []
    while len(made):
        oldest = made.oldest()
        batch = made.take(40)
        assert oldest in batch
        taken += batch
    assert len(taken) == 500 and set(taken) == set(pieces)
