"""Grids of reward-lens 2.0.1 (arXiv 2604.26130), where it is installed: `make test-reward-lens`."""

from __future__ import annotations

import models as M
import pytest
import torch

import rmfast

reward_lens = pytest.importorskip("reward_lens", reason="reward-lens is not installed")
if not hasattr(reward_lens, "ActivationPatcher"):
    pytest.skip(f"reward-lens {reward_lens.__version__} has no ActivationPatcher", allow_module_level=True)


@pytest.fixture(scope="module")
def pair():
    model, tokenizer = M.decoder("llama", num_hidden_layers=3), M.tokenizer(kind="plain", chat=True)
    from reward_lens.model import RewardModel
    from reward_lens.model_adapters import get_adapter

    theirs = RewardModel(model, tokenizer, get_adapter(model), torch.device("cpu"))
    return theirs, rmfast.RewardModel(model, tokenizer), M.reward_scale(model)


TEXTS = ("How was it?", "A wonderful film!", "A terrible  film!")  # as many tokens in both answers


@pytest.mark.parametrize("mode", ["noising", "denoising"])
@pytest.mark.parametrize("grid", ["components", "heads"])
def test_its_grids_are_ours(grid, mode, pair):
    theirs, ours, scale = pair
    patcher = reward_lens.ActivationPatcher(theirs)
    run = patcher.patch_all_components if grid == "components" else patcher.patch_all_heads
    want = run(*TEXTS, mode=mode, show_progress=False)
    prompt, preferred, dispreferred = TEXTS
    texts = [theirs.tokenize_conversation(prompt, answer)["input_ids"][0] for answer in (preferred, dispreferred)]
    assert len(texts[0]) == len(texts[1])
    sites = ["attn_out", "mlp_out"] if grid == "components" else "head_out"
    sweep = ours.patch_sweep(*texts, mode=mode, sites=sites, positions="joint")
    effect = sweep.effect[:, :, 0].T if grid == "components" else sweep.effect[:, 0]
    # Theirs is how much of the pair's gap a patch takes away.
    got = -effect if mode == "noising" else effect
    torch.testing.assert_close(got.flatten().double(), torch.from_numpy(want.patch_effects), rtol=0, atol=1e-5 * scale)
