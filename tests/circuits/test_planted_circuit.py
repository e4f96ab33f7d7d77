"""A model whose weights implement one path: path patching finds its edges, and nothing else.

Tokens "+" and "-" write their sign to channel 1, "m" and "n" theirs to channel 2. Head 1 of layer 0 brings the mean of
channel 1 to channel 4 (its head 3 to channel 6, which nobody reads). Head 2 of layer 1 queries by channel 4 for keys by
channel 2, looks at "m" or at "n" for it, and brings channel 2 from there to channel 5: the reward. So a change of "+"
goes embedding → v of head 1 → q of head 2 → reward.
"""

from __future__ import annotations

import models as M
import pytest
import torch

import rmfast
from rmfast.circuits.circuit import Circuit
from rmfast.circuits.faithfulness import faithfulness
from rmfast.circuits.nodes import RECEIVERS, Node
from rmfast.circuits.paths import path_patch
from rmfast.circuits.scores import Edge

PATH = {
    (Node("embedding"), Node("v_input", 0, 1)),
    (Node("head_out", 0, 1), Node("q_input", 1, 2)),
    (Node("head_out", 1, 2), Node("reward")),
}


def planted():
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    # The pairs of a head's second dimension turn by 1e-6 a token: the head reads at any distance.
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e12}}
    model, tokenizer = M.decoder("llama", **sizes, **rope), M.tokenizer()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            p.fill_(1.0 if "norm" in name else 0.0)
        embed = parameters["model.embed_tokens.weight"]
        embed[:, 0] = 10  # so that the norms scale all texts alike
        for tokens, channel in (("+-", 1), ("mn", 2)):
            embed[tokenizer.convert_tokens_to_ids(list(tokens)), channel] = torch.tensor([1.0, -1.0])

        def put(layer, name, row, column, value):
            parameters[f"model.layers.{layer}.self_attn.{name}_proj.weight"][row, column] = value

        for head, channel in ((1, 4), (3, 6)):
            put(0, "v", 4 * head, 1, 1.0)
            put(0, "o", channel, 4 * head, 20.0)
        put(1, "q", 4 * 2 + 1, 4, 40.0)
        put(1, "k", 4 * 2 + 1, 2, 40.0)
        put(1, "v", 4 * 2, 2, 4.0)
        put(1, "o", 5, 4 * 2, 4.0)
        parameters["score.weight"][0, 5] = 4.0
    return rmfast.RewardModel(model, tokenizer)


@pytest.mark.parametrize("through", ["residual", "mlps"])
@pytest.mark.parametrize("mode", ["noising", "denoising"])
def test_the_planted_path_is_found_and_nothing_else(mode, through):
    found = path_patch(planted(), "a m b n + c.", "a m b n - c.", receivers=RECEIVERS, mode=mode, through=through)
    gap = float(found.other_reward - found.base_reward)
    assert abs(gap) > 1
    strong = {(row.sender, row.receiver) for row in found.rows() if abs(row.effect) > 1e-3 * abs(gap)}
    assert strong == PATH
    for row in found.top(3):
        assert row.recovered == pytest.approx(1, abs=1e-3)


def test_the_planted_path_is_a_faithful_and_complete_circuit():
    """Its edges do all of it, and those of another path nothing."""
    other = (Edge(Node("embedding"), Node("v_input", 0, 3)), Edge(Node("head_out", 0, 3), Node("reward")))
    circuits = [Circuit(tuple(Edge(*two) for two in PATH)), Circuit(other)]
    found = faithfulness(planted(), circuits, "a m b n + c.", "a m b n - c.")
    path, others = found.shares
    assert abs(found.model[0] - found.none[0]) > 1
    assert (path.faithfulness, path.left) == pytest.approx((1, 0), abs=1e-3)
    assert (others.faithfulness, others.left) == pytest.approx((0, 1), abs=1e-3)
