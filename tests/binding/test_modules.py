"""Looking through a model's modules: what torch's own walk gives, in its order."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from rmfast.binding.compute import chosen
from rmfast.binding.modules import modules_of, parameters_of
from rmfast.binding.rope import rope_modules


def _shared() -> nn.Module:
    part = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    root = nn.Sequential(part, nn.ModuleDict({"again": part, "own": nn.Sequential(part[0], nn.LayerNorm(2))}))
    root.register_module("none", None)
    root[1]["own"][1].register_parameter("gone", None)
    return root


def _model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=1
    )
    return transformers.LlamaForSequenceClassification(config)


@pytest.mark.parametrize("make", [_shared, _model, lambda: nn.Linear(1, 1)])
def test_modules_and_parameters_are_torchs(make):
    root = make()
    assert modules_of(root) == list(root.modules())
    got, want = parameters_of(modules_of(root)), list(root.parameters())
    assert list(map(id, got)) == list(map(id, want))


def test_a_rope_type_may_be_the_instances_or_the_class():
    class Dynamic(nn.Module):
        rope_type = "dynamic"

    class Told(nn.Module):
        @property
        def rope_type(self):
            return "dynamic"

    own, default = nn.Identity(), nn.Identity()
    own.rope_type, default.rope_type = {"full": "dynamic", "sliding": "default"}, "default"
    root = nn.ModuleList([Dynamic(), Told(), own, default, nn.Identity()])
    assert rope_modules(root) == list(root[:3])


def test_packed_integers_are_quantised_as_buffers_and_as_parameters():
    buffers, parameters = nn.Linear(2, 2), nn.Linear(2, 2)
    buffers.register_buffer("packed", torch.zeros(2, dtype=torch.int32))
    parameters.packed = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    for root in (buffers, parameters):
        assert chosen("auto", root) == (False, "its weights are quantised, and multiply by themselves")
    assert chosen("fp32", nn.Linear(2, 2))[0]
