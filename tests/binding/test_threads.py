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
from rmfast.binding.session import eval_mode, lock_of

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


def test_models_on_one_body_share_a_lock_and_score_at_once(busy):
    first, second = M.decoder("llama"), M.decoder("llama", seed=1)
    second.model = first.model
    assert lock_of(first) is lock_of(second) and lock_of(first) is not lock_of(M.decoder("llama"))
    models = [RewardModel(first), RewardModel(second)]
    wants = [model.score(IDS) for model in models]
    for reward_model, want in zip(models, wants):
        busy(reward_model, want)
    for _ in range(10):
        for reward_model, want in zip(models, wants):
            assert torch.allclose(reward_model.score(IDS), want, rtol=0, atol=1e-5)


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
