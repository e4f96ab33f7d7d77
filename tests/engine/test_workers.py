"""One call on several devices: the same bits as in one process, in the same order, and no hang where a process ends."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import models
import pytest
import torch

import rmfast
from rmfast.engine.workers import Workers, parts_of
from rmfast.heads import FunctionHead

TWO = ["cpu", "cpu"]
PROMPTS = ["What is a tree?", "Name a river that is long.", ""]
PAIRS = [(PROMPTS[i % 3], f"{'word ' * (i % 13)}{i}") for i in range(60)]


@pytest.fixture(scope="module")
def rm() -> Any:
    return rmfast.RewardModel(models.decoder(), models.tokenizer())


def test_rewards_are_those_of_one_process_to_the_bit(rm):
    assert rm.moves() is None
    options = {"positions": [-2] * len(PAIRS), "normalize": (1.0, 2.0)}
    got = rm.score(PAIRS, device=TWO, batch_tokens=64, **options)
    assert torch.equal(got, rm.score(PAIRS, **options))


def test_token_values_are_too_with_what_the_model_is_under():
    several = rmfast.RewardModel(models.decoder("qwen3", labels=3), models.tokenizer(), pooling="last")
    clamp = rmfast.NeuronClamp({"model.layers.0.mlp.down_proj": (torch.tensor([3]), torch.tensor([0.5]))})
    clamped = several.with_interventions(clamp)
    want = clamped.token_values(PAIRS[:8])
    assert not torch.equal(want[0], several.token_values(PAIRS[:1])[0])
    for got, each in zip(clamped.token_values(PAIRS[:8], device="cpu"), want, strict=True):
        assert torch.equal(got, each)


def test_an_input_that_is_wrong_is_named_before_anything_starts(rm):
    with pytest.raises(rmfast.InputError, match="input 1"):
        rm.score(["a", ""[:0] or [], "b"], device=TWO)


@pytest.mark.parametrize("device", [[], ["cpu", "meta"], ["cuda:99"], [True], {"cpu"}, "nowhere", 3.5])
def test_devices_that_are_none_are_refused(rm, device):
    with pytest.raises((ValueError, TypeError), match="device"):
        rm.score(["a"], device=device)


def test_what_can_not_go_along_is_refused(rm):
    with pytest.raises(ValueError, match="no device with interventions"):
        rm.score(["a"], device=TWO, interventions=[None])
    with pytest.raises(ValueError, match='or device with output="all"'):
        rm.score(["a"], device=TWO, output="all")
    local = rmfast.RewardModel(models.decoder(), models.tokenizer(), head=FunctionHead(lambda h: h[:, 0]))
    with pytest.raises(ValueError, match="can be sent to other processes"):
        local.score(["a"], device=TWO)


def test_a_copy_here_has_the_engine_and_a_pickle_makes_its_own(rm):
    rm.score(["a"])
    assert copy.copy(rm)._engine is rm._engine is not None
    there = pickle.loads(pickle.dumps(rm))
    assert there._engine is None
    assert torch.equal(there.score(PAIRS[:4]), rm.score(PAIRS[:4]))


def test_an_error_of_a_process_is_raised_here(rm):
    with pytest.raises(ValueError, match="on cpu: Expected engine"):
        rm.score(["a"], device=["cpu"], engine="fast")


def test_a_process_that_is_killed_is_an_error_and_not_a_wait(rm):
    encoded = rm.encode(PAIRS * 400)
    with Workers(rm, TWO) as workers:
        processes = list(workers._processes)
        threading.Timer(0.2, os.kill, [processes[0].pid, signal.SIGKILL]).start()
        with pytest.raises(RuntimeError, match="for cpu to run, but it ended with exit code -9"):
            workers.run(encoded, rm.reads(encoded), 64, False, None)
        assert not any(process.is_alive() for process in processes)
        with pytest.raises(RuntimeError, match="these have ended"):
            workers.run(encoded[:1], rm.reads(encoded[:1]), None, False, None)


_ABANDONED = """
import os, sys
import models
import rmfast
from rmfast.engine.workers import Workers
if __name__ == "__main__":
    workers = Workers(rmfast.RewardModel(models.decoder(), models.tokenizer()), ["cpu"])
    print(workers._processes[0].pid, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "abandoned.py").write_text(_ABANDONED)
    paths = os.pathsep.join([os.getcwd(), str(Path(models.__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, tmp_path / "abandoned.py"],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL
    worker, deadline = Path(f"/proc/{int(done.stdout)}"), time.monotonic() + 30
    while worker.exists() and "(zombie)" not in (worker / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_parts_keep_a_prompts_responses_together_and_are_even(rm):
    encoded = rm.encode([(f"prompt {i % 12} {'x' * 40}", f"{i}") for i in range(240)])
    parts = list(parts_of(encoded, 2, 64))
    assert sorted(i for part in parts for i in part) == list(range(240))
    at = {i: number for number, part in enumerate(parts) for i in part}
    assert all(len({at[i] for i in range(prompt, 240, 12)}) == 1 for prompt in range(12))
    assert len(parts) > 4
    few = rm.encode(["a text", "other words", "more of them", "the last"])
    assert len(list(parts_of(few, 2, 4096))) == 2  # one for each
    assert list(parts_of([], 2, 64)) == []
