"""Models from `rmfast.load`: bound with one layer in place of all, held against the whole model before they score."""

from __future__ import annotations

import copy

import models as M
import pytest
import torch
from torch import nn

import rmfast
from rmfast import RewardModel
from rmfast.binding.find import bind
from rmfast.binding.sketch import sketch

IDS = M.token_ids([5, 33, 2, 17])


@pytest.fixture
def runs(monkeypatch):
    """The layers' runs so far, by their index."""
    seen = []
    own = M.decoder("llama").model.layers[0].__class__.forward

    def forward(self, *args, **kwargs):
        seen.append(self.self_attn.layer_idx)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(M.decoder("llama").model.layers[0].__class__, "forward", forward)
    return seen


def saved(tmp_path, model):
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_loaded_model_runs_as_a_whole_when_it_is_first_used(tmp_path, runs):
    model = M.decoder("llama")
    loaded = rmfast.load(saved(tmp_path, model))
    assert set(runs) == {0} and (loaded.num_labels, "norm='rms'" in repr(loaded)) == (1, True)
    binding = loaded.binding
    assert set(runs) == {0, 1} and loaded.binding is binding
    whole = RewardModel(model)
    assert torch.equal(loaded.score(IDS), whole.score(IDS))
    assert (binding.reading, binding.causal, binding.norm_name) == ("last but pad", True, whole.binding.norm_name)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "mistral"])
def test_a_sketch_finds_what_the_whole_model_shows(kind):
    model = M.decoder(kind)
    drawn, whole = sketch(model), bind(model)
    assert drawn is not None
    for name in (
        "body_name",
        "norm_name",
        "norm_kind",
        "head_names",
        "num_labels",
        "causal",
        "width",
        "reading",
        "padded",
    ):
        assert getattr(drawn, name) == getattr(whole, name), name


def test_a_sketch_is_not_drawn_of_layers_that_are_hooked_or_pool_by_themselves():
    model = M.decoder("llama")
    model.model.layers[1].register_forward_hook(lambda *_: None)
    assert sketch(model) is None
    assert sketch(M.encoder("Bert")) is None


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_loaded_model_is_refused_at_first_use_where_only_the_whole_shows_why(tmp_path):
    model = M.decoder("llama")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(3e38)
    loaded = rmfast.load(saved(tmp_path, model))
    with pytest.raises(ValueError, match="activations overflow in float32"):
        loaded.score(IDS)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_a_head_that_is_replaced_before_the_first_use_is_refused(tmp_path):
    loaded = rmfast.load(saved(tmp_path, M.decoder("llama")))
    loaded.model.score = nn.Linear(loaded.model.score.in_features, 3, bias=False)
    with pytest.raises(ValueError, match=r"other parts than when it was loaded: .*\], 1\), got .*\], 3\)"):
        loaded.score(IDS)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_copies_of_a_loaded_model_prove_themselves(tmp_path):
    loaded = rmfast.load(saved(tmp_path, M.decoder("llama")))
    copied = copy.deepcopy(loaded)
    assert torch.equal(copied.score(IDS), loaded.score(IDS))
