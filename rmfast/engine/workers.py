"""Runs of one model on several devices of a machine: a process for each, with a copy of the model."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from tqdm.auto import tqdm

from rmfast import arguments
from rmfast.binding.session import lock_of
from rmfast.engine.options import checked_run
from rmfast.texts.inputs import Encoded

# Tasks for each worker: more of them even out what takes long, fewer share more of their prompts.
_TASKS = 8
_LEAST = 4  # batches of a task, at least


class Workers:
    """Processes that hold copies of a model; `run` is `Scorer.run` on all of them.

    Args:
        scorer: a `Scorer`, the model as it is now. What is changed in it later is not seen.
        devices: one for each process, as torch names them; several may be the same.

    Raises:
        ValueError: no devices, or one that is not there; the model is spread over devices or can't be sent to another
            process (a head that is a local function).
        RuntimeError: a process did not start, for want of memory.
    """

    def __init__(self, scorer: Any, devices: Sequence[Any]) -> None:
        self.devices = [_there(each) for each in _listed(devices)]
        packed = _packed(scorer)
        context = multiprocessing.get_context("spawn")  # a fork would inherit CUDA and threads that are not there
        self._processes: list[Any] = []
        self._ends: list[Connection] = []
        try:
            for device in self.devices:
                here, there = context.Pipe()
                process = context.Process(
                    target=_work, args=(*packed, device, torch.get_num_threads(), there), daemon=True
                )
                process.start()
                there.close()  # so that each sees when the other has ended
                self._processes.append(process)
                self._ends.append(here)
            for worker in range(len(self.devices)):
                self._result_of(worker)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
        for process, end in zip(self._processes, self._ends):
            process.join()
            end.close()
        self._processes, self._ends = [], []

    def run(
        self,
        encoded: list[Encoded],
        read: list[np.ndarray],
        batch_tokens: int | None,
        progress: bool,
        engine: str | None,
    ) -> list[Tensor]:
        """What `Scorer.run` gives: rewards (len(read[i]), K) of each input at its tokens read[i], on the CPU."""
        batch_tokens = checked_run(batch_tokens, progress)
        if not self._ends:
            raise RuntimeError("Expected workers that run: these have ended")
        found: list[Any] = [None] * len(encoded)
        parts = parts_of(encoded, len(self.devices), batch_tokens or 4096)
        try:
            with tqdm(total=len(encoded), unit="text", disable=not progress) as bar:
                at: dict[int, list[int]] = {}  # by worker, the part that it is at
                for worker, part in zip(range(len(self._ends)), parts):
                    self._send(worker, part, encoded, read, batch_tokens, engine)
                    at[worker] = part
                while at:
                    worker = self._ready(at)
                    values, part = self._result_of(worker), at.pop(worker)
                    for i, value in zip(part, values, strict=True):
                        found[i] = torch.from_numpy(value)
                    bar.update(len(values))
                    if (following := next(parts, None)) is not None:
                        self._send(worker, following, encoded, read, batch_tokens, engine)
                        at[worker] = following
        except BaseException:
            self.close()  # what others are at is no answer to a later question
            raise
        return found

    def _send(self, worker: int, part: list[int], encoded: Any, read: Any, *options: Any) -> None:
        with self._alive(worker):
            self._ends[worker].send(([encoded[i] for i in part], [read[i] for i in part], *options))

    def _ready(self, at: Iterable[int]) -> int:
        """A worker, of those at work, that has a result or has ended; RuntimeError where another has ended."""
        ends: dict[Any, int] = {self._ends[worker]: worker for worker in at}
        gone: dict[Any, int] = {process.sentinel: worker for worker, process in enumerate(self._processes)}
        ready = wait([*ends, *gone])
        for each in ready:
            if each in ends:
                return ends[each]
        raise self._ended(gone[ready[0]])

    def _result_of(self, worker: int) -> Any:
        """What it says next. Raises what it raised, and RuntimeError where it ended without a word."""
        with self._alive(worker):
            result, error = self._ends[worker].recv()
        if error is not None:
            raise error
        return result

    @contextmanager
    def _alive(self, worker: int) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:  # BrokenPipeError, ConnectionResetError
            raise self._ended(worker) from error

    def _ended(self, worker: int) -> RuntimeError:
        process = self._processes[worker]
        process.join(5)
        return RuntimeError(
            f"Expected the process for {self.devices[worker]} to run, but it ended with exit code {process.exitcode}"
        )


@contextmanager
def runner(scorer: Any, devices: Any) -> Iterator[Any]:
    """The `run` of workers, while it is entered; the scorer's own where no devices are given."""
    if devices is None:
        yield scorer.run
        return
    with Workers(scorer, devices) as workers:
        yield workers.run


def _listed(devices: Any) -> list[Any]:
    one = isinstance(devices, str | int | torch.device) and not isinstance(devices, bool)
    found = [devices] if one else arguments.sequence("device", devices, "a device or several")
    if not found:
        raise ValueError("Expected device to name at least one, got none")
    return found


def _there(given: Any) -> str:
    device = arguments.device("device", given)
    try:
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"Expected device to be one of this machine, got {device} ({error})") from error
    return str(device)


def parts_of(encoded: list[Encoded], workers: int, batch_tokens: int) -> Iterator[list[int]]:
    """Which inputs run together: those that begin alike are side by side, and a part ends where little is shared."""
    order = sorted(range(len(encoded)), key=lambda i: encoded[i].ids.astype(">u4").tobytes())
    tokens = sum(map(len, encoded))
    most = max(_LEAST * batch_tokens, tokens // (_TASKS * workers) + 1)
    most = min(most, tokens // workers + 1)  # few texts: every worker has some
    part: list[int] = []
    size = 0
    for i in order:
        if part and (size >= 2 * most or (size >= most and not _share(encoded[part[-1]], encoded[i]))):
            yield part
            part, size = [], 0
        part.append(i)
        size += len(encoded[i])
    if part:
        yield part


def _share(one: Encoded, other: Encoded) -> bool:
    """Whether two texts begin with the same half of the shorter one."""
    half = min(len(one), len(other)) // 2
    return bool(half) and np.array_equal(one.ids[:half], other.ids[:half])


class _Packer(pickle.Pickler):
    """Leaves tensors out, which go by shared memory and may land on another device."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, found: Any) -> int | None:
        if not isinstance(found, Tensor):
            return None
        if type(found) not in (Tensor, nn.Parameter):
            raise ValueError(f"its weights are of a kind of their own, {type(found).__name__}")
        if id(found) not in self._places:
            self._places[id(found)] = len(self.tensors)
            self.tensors.append(found)
        return self._places[id(found)]


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: Any, tensors: list[Tensor], device: str) -> None:
        super().__init__(file)
        self._tensors, self._device = tensors, device
        self._moved: dict[int, Tensor] = {}

    def persistent_load(self, place: int) -> Tensor:
        if place not in self._moved:
            given = self._tensors[place]
            moved = given.detach().to(self._device)
            self._moved[place] = nn.Parameter(moved, given.requires_grad) if isinstance(given, nn.Parameter) else moved
        return self._moved[place]


def _packed(scorer: Any) -> tuple[bytes, list[Tensor]]:
    """A scorer as bytes and the tensors in it."""
    if len({parameter.device for parameter in scorer.binding.root.parameters()}) > 1:
        raise ValueError("Expected a model on one device, which is copied to others; this one is spread over several")
    file = io.BytesIO()
    packer = _Packer(file)
    try:
        with lock_of(scorer.binding.root):  # while no session has replaced a part of it
            packer.dump(scorer)
    except Exception as error:  # pickle raises AttributeError, TypeError, PicklingError, and what is raised above
        raise ValueError(f"Expected a model that can be sent to other processes: {error}") from error
    return file.getvalue(), [tensor.detach() if not tensor.is_leaf else tensor for tensor in packer.tensors]


def _work(packed: bytes, tensors: list[Tensor], device: str, threads: int, end: Connection) -> None:
    """A worker's life: say that the model is there, then run what comes, until nobody is there to ask."""
    try:
        torch.set_num_threads(threads)
        scorer = _Unpacker(io.BytesIO(packed), tensors, device).load()
        end.send((None, None))
        while True:
            try:
                encoded, read, batch_tokens, engine = end.recv()
            except EOFError:
                return
            values = scorer.run(encoded, read, batch_tokens, False, engine)
            end.send(([value.numpy() for value in values], None))
    except Exception as error:
        end.send((None, _sendable(error, device)))


def _sendable(error: Exception, device: str) -> Exception:
    """An error as another process can raise it: its kind where that is one of Python's, and what it says."""
    kind = next((kind for kind in (ValueError, TypeError, MemoryError) if isinstance(error, kind)), RuntimeError)
    return kind(f"on {device}: {error}")
