"""One model in several threads: copies, shared parts and modes are right whatever else scores."""

from __future__ import annotations

import copy
import threading
import time

import models as M
import pytest
import torch
from torch import nn

from rmfast import RewardModel, interventions
from rmfast.binding.session import eval_mode, lock_of, replaced_forward

IDS = M.token_ids([5, 33, 2, 17])


@pytest.fixture
def busy():
    """Keeps some RewardModels scoring in other threads; what they scored is held against `want` at the end."""
    stop, threads, wrong = threading.Event(), [], []

    def start(reward_model, want):
        def work():
            while not stop.is_set():
                got = reward_model.score(IDS)
                if not torch.allclose(got, want, rtol=0, atol=1e-5):
                    wrong.append(got)

        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("clamped", [None, "last", "all"])
def test_copies_made_while_another_thread_scores_are_whole(busy, clamped):
    reward_model = RewardModel(M.decoder("llama"))
    if clamped is not None:
        clamp = interventions.NeuronClamp({"model.layers.0.mlp.up_proj": ([1, 2], [0.5, -1.0])}, positions=clamped)
        reward_model = reward_model.with_interventions(clamp)
    want = reward_model.score(IDS)
    busy(reward_model, want)
    for _ in range(20):
        made = copy.deepcopy(reward_model)
        assert made.model is not reward_model.model and made.binding.root is made.model
        assert not forwards(made.model)
        assert torch.equal(made.score(IDS), want)
        time.sleep(0.002)


def test_a_copy_is_of_the_model_and_of_what_belongs_to_it():
    reward_model = RewardModel(M.decoder("llama"))
    want = reward_model.score(IDS)
    made = copy.deepcopy(reward_model)
    with torch.no_grad():
        made.model.score.weight.mul_(2)
    torch.testing.assert_close(made.score(IDS), 2 * want)
    assert torch.equal(reward_model.score(IDS), want)


def waits(first, second):
    """Whether a thread that wants one model waits while another has the other."""
    taken = threading.Event()

    def take():
        with lock_of(second):
            taken.set()

    thread = threading.Thread(target=take)
    with lock_of(first):
        thread.start()
        got = taken.wait(0.2)
    thread.join()
    return not got


def one_body(how):
    """Two models on one body, and their RewardModels."""
    first, second, third = (M.decoder("llama", seed=seed) for seed in range(3))
    if how == "before binding":
        second.model = first.model
    models = [RewardModel(first), RewardModel(second)]
    for reward_model in models:
        reward_model.score(IDS)
    if how == "after both scored":
        second.model = first.model
    elif how == "a body of a third":
        first.model = third.model
        models[1] = RewardModel(third)
    return models


@pytest.mark.parametrize("how", ["before binding", "after both scored", "a body of a third"])
def test_models_on_one_body_wait_for_each_other_and_score_at_once(busy, how):
    models = one_body(how)
    first, second = (each.model for each in models)
    assert waits(first, second) and waits(second, first) and not waits(first, M.decoder("llama"))
    wants = [M.own(model, IDS) for model in (first, second)]
    for reward_model, want in zip(models, wants):
        busy(reward_model, want)
    for _ in range(40):
        for reward_model, want in zip(models, wants):
            assert torch.allclose(reward_model.score(IDS), want, rtol=0, atol=1e-5)
    for model in (first, second):
        with lock_of(model):
            assert not forwards(model)


def test_a_model_and_its_copy_under_interventions_wait_for_each_other():
    models = one_body("after both scored")
    clamp = interventions.NeuronClamp({"model.layers.0.mlp.up_proj": ([1], [0.5])}, positions="all")
    changed = models[0].with_interventions(clamp)
    assert changed.binding.root is not models[0].binding.root
    assert all(waits(changed.binding.root, each.model) and waits(each.model, changed.binding.root) for each in models)


def test_models_of_one_configuration_score_at_once(busy):
    first = M.decoder("gpt2")
    second = M.randomised(type(first)(first.config), 1)
    kind, models = type(first.config), [RewardModel(first), RewardModel(second)]
    assert first.config is second.config and "packed" in models[0].explain()
    wants = [M.own(model, IDS) for model in (first, second)]
    for reward_model, want in zip(models, wants):
        busy(reward_model, want)
    for _ in range(60):
        for reward_model, want in zip(models, wants):
            assert torch.allclose(reward_model.score(IDS), want, rtol=0, atol=1e-5)
    with lock_of(first), lock_of(second):
        assert type(first.config) is kind


def test_a_forward_that_is_set_during_a_run_stays_and_runs_the_modules_own():
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    want = module(x)
    with replaced_forward(module, torch.zeros_like):
        assert not module(x).any()
        inner = module.forward
        module.forward = lambda x: 2 * inner(x)
        assert not module(x).any()
    torch.testing.assert_close(module(x), 2 * want)


def test_each_of_two_threads_scores_a_training_model_without_dropout_and_gives_its_mode_back(busy):
    first, second = (M.decoder("llama", attention_dropout=0.5, seed=seed) for seed in (0, 1))
    second.model = first.model
    models = [RewardModel(first), RewardModel(second)]
    wants = [model.score(IDS) for model in models]
    first.train(), second.train()
    busy(models[0], wants[0])
    for _ in range(10):
        assert torch.allclose(models[1].score(IDS), wants[1], rtol=0, atol=1e-5)
    with lock_of(first):  # while nothing scores
        assert all(module.training for model in (first, second) for module in model.modules())


def test_the_mode_is_put_back_when_switching_it_fails():
    class Stubborn(nn.Module):
        def __setattr__(self, name, value):
            if name == "training" and not value:
                raise RuntimeError("always training")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Dropout(), Stubborn())
    with pytest.raises(RuntimeError, match="always training"), eval_mode(model):
        pass
    assert all(module.training for module in model.modules())


def test_a_model_that_another_thread_runs_is_bound_and_tried_and_patched():
    """What is tried on the model, by hooks, is of the thread that tries; the other's forwards are the model's own."""
    model, long = M.decoder("qwen3"), torch.tensor(M.token_ids([90]))
    with torch.no_grad():
        own = model(input_ids=long).logits
    stop, wrong = threading.Event(), []

    def run():
        while not stop.is_set():
            with torch.no_grad():
                if not torch.allclose(model(input_ids=long).logits, own, rtol=0, atol=1e-5):
                    wrong.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        want = None
        for _ in range(8):
            rm = RewardModel(model)
            grid = rm.patch_sweep(IDS[1], IDS[1][:20] + IDS[3][:13], sites=["resid_post"]).rewards
            got = torch.cat([rm.score(IDS), grid.flatten()])
            want = got if want is None else want
            assert "packed, fused layers" in rm.explain()
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5, equal_nan=True)
    finally:
        stop.set()
        thread.join()
    assert not wrong
