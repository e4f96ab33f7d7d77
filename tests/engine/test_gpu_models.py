"""Every family on a CUDA device: packed and padded scores against each text alone, in fp32."""

from __future__ import annotations

import copy

import models as M
import pytest
import torch

from rmfast.reward_model import RewardModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("family", [f for f in M.DECODERS if f != "gemma2"])
def test_scores_on_the_gpu_are_those_of_each_text_alone(family, engine):
    model = M.decoder(family)
    prompt = M.token_ids([12])[0]
    inputs = [prompt + ids for ids in M.token_ids([5, 9, 1], 4)] + M.token_ids([40, 3], 8)
    want = torch.stack([M.alone(copy.deepcopy(model), ids) for ids in inputs])[:, 0]
    got = RewardModel(copy.deepcopy(model).cuda()).score(inputs, engine=engine, max_length=128)
    M.assert_rewards(got, want, M.reward_scale(model))


@pytest.mark.parametrize("family", [f for f in M.DECODERS if f not in ("gemma2", "phi3-longrope", "llama-dynamic")])
def test_scores_in_graphs_on_the_gpu_are_those_of_each_text_alone(family):
    model = M.decoder(family)
    batches = [[M.token_ids([12], seed)[0] + ids for ids in M.token_ids([5, 9, 1, 30], seed)] for seed in range(4)]
    rm = RewardModel(copy.deepcopy(model).cuda(), cuda_graphs=True)
    for some in batches:  # one shape: as it is, captured, replayed on other texts
        want = torch.stack([M.alone(copy.deepcopy(model), ids) for ids in some])[:, 0]
        M.assert_rewards(rm.score(some, max_length=128), want, M.reward_scale(model))
