"""Heads with several outputs and a gate: ArmoRM, QRM, URM, LDL."""

from __future__ import annotations

import headed as C
import models as M
import numpy as np
import pytest
import torch
from torch.nn import functional

import rmfast
from rmfast.heads.gated import ARMORM
from rmfast.heads.given import last_occurrence, pattern_of
from rmfast.texts.inputs import InputError

GATE = (0, 1, 2, 3)


def gate_at(ids: np.ndarray) -> int:
    """As ArmoRM's code looks for it."""
    ids = ids.tolist()
    return next(j for j in range(len(ids) - len(C.PATTERN), -1, -1) if ids[j : j + len(C.PATTERN)] == C.PATTERN)


def armorm(path, quantiles=0, **kw):
    """A checkpoint of ArmoRM's layout (with `quantiles` QRM's), its tensors and its body."""
    body = C.body()
    tensors = {
        "regression_layer.weight": C.random(19 * max(1, quantiles), C.D),
        "reward_transform_matrix": torch.eye(19) + 0.3 * C.random(19, 19, seed=1),
        "gating.logit_scale": torch.tensor([1.25]),
        **C.linears("gating.layers", C.D, 32, 32, 32, 19, seed=3),
    }
    config = {"num_objectives": 19, "gating_temperature": 0.7, "gating_hidden_dim": 32, "gating_n_hidden": 3}
    if quantiles:
        config |= {"num_quantiles": quantiles, "architectures": ["LlamaForRewardModelWithGating31"]}
    C.write(path, body, tensors, **{"architectures": ["LlamaForRewardModelWithGating"], **config, **kw})
    return body, tensors


def armorm_formula(tensors, x, gate_row, gate):
    """Attributes (19,), gates (19,) and score."""
    rewards = tensors["regression_layer.weight"].double() @ x
    gates = (gate(gate_row[None])[0] / 0.7).softmax(-1) * 1.25
    return rewards, gates, (gates * (rewards @ tensors["reward_transform_matrix"].double())).sum()


def wanted_armorm(body, tensors, rm, inputs):
    encoded = rm.encode(inputs)
    parts = []
    for item, x in zip(encoded, C.states(body, encoded)):
        parts.append(
            armorm_formula(
                tensors, x[-1], x[gate_at(item.ids)],
                lambda row: C.layered(tensors, "gating.layers", GATE, torch.relu, row),
            )
        )  # fmt: skip
    return [torch.stack(part) for part in zip(*parts)]


def test_armorm_scores_as_published(tmp_path):
    body, tensors = armorm(tmp_path)
    rm = rmfast.load(tmp_path, device="cpu")
    assert rm.binding.program.pattern == tuple(C.PATTERN) and rm.num_labels == 1
    rewards, gates, scores = wanted_armorm(body, tensors, rm, C.PAIRS)
    C.assert_alike(rm, C.PAIRS, scores)
    for engine in ("packed", "padded"):
        found = rm.score(C.PAIRS, output="all", engine=engine)
        C.assert_near(found["scores"], scores)
        C.assert_near(found["rewards"], rewards)
        C.assert_near(found["gates"], gates)
        assert tuple(found["names"]) == ARMORM


def test_all_responses_share_the_row_of_their_prompts_gate(tmp_path):
    armorm(tmp_path)
    rm = rmfast.load(tmp_path, device="cpu")
    seen = []

    class Seen(type(rm.binding)):
        def row_values(self, hidden, rows, gates):
            seen.append((len(rows), len(gates)))
            return super().row_values(hidden, rows, gates)

    rm.binding.__class__ = Seen
    texts = [("one prompt", f"answer {i}") for i in range(40)]
    together = rm.score(texts)
    rows, gates = map(sum, zip(*seen))
    assert 41 <= rows <= 41 + 2 * 16 and gates == 1  # and padding
    assert torch.equal(together, rm.score(texts, batch_tokens=16))
    seen.clear()
    rm.score([texts[0], ("another", "text")], engine="padded")
    assert seen == [(4, 2)] or seen == [(2, 1), (2, 1)]
    seen.clear()
    rm.token_values(texts[:2])
    assert sum(gates for _, gates in seen) == 1


def test_every_token_has_a_value_under_its_texts_gate(tmp_path):
    armorm(tmp_path)
    rm = rmfast.load(tmp_path, device="cpu")
    for engine in ("packed", "padded"):
        values = rm.token_values(C.PAIRS, engine=engine)
        for pair, some in zip(C.PAIRS, values):
            at = [0, len(some) // 2, len(some) - 1]
            C.assert_near(some[at], torch.cat([rm.score([pair], positions=[i]) for i in at]).double())


def test_the_gate_of_a_conversation_is_at_its_last_prompt(tmp_path):
    body, tensors = armorm(tmp_path)
    rm = rmfast.load(tmp_path, device="cpu")
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, ["a", "b", "c", "d"])]
    C.assert_near(rm.score([turns]), wanted_armorm(body, tensors, rm, [turns])[2])


def test_a_text_without_the_prompts_end_is_refused(tmp_path):
    armorm(tmp_path)
    rm = rmfast.load(tmp_path, device="cpu")
    with pytest.raises(InputError, match=r"the ids \[257, 263\].*are not in it") as caught:
        rm.score([C.PAIRS[0], "no prompt"])
    assert caught.value.index == 1


def published(vocabulary, template):
    """A tokenizer of some words with the ids that they have in a published one's vocabulary."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {**vocabulary, "[UNK]": 3, "user": 4, **{letter: 5 + i for i, letter in enumerate("abcd")}}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    backend.add_special_tokens([word for word in vocabulary if word.startswith("<")])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    made.chat_template = template
    return made


def test_the_pattern_is_the_templates_or_that_of_the_model_type():
    assert pattern_of(M.tokenizer("decoder", chat=True), "llama") == (M.EOS, M.ASSISTANT)
    assert pattern_of(None, "llama") == (128009, 128006, 78191, 128007, 271)
    assert pattern_of(M.tokenizer(), "gemma2") == (107, 108, 106, 2516, 108)
    with pytest.raises(ValueError, match="chat template"):
        pattern_of(None, "qwen2")
    for ids, words, template in (
        (
            (128009, 128006, 78191, 128007, 271),
            ("<|eot_id|>", "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"),
            "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
            "{% endfor %}",
        ),
        (
            (107, 108, 106, 2516, 108),
            ("<end_of_turn>", "\n", "<start_of_turn>", "model", "\n"),
            "{% for m in messages %}<start_of_turn>{{ m['role'].replace('assistant', 'model') }}\n{{ m['content'] }}"
            "<end_of_turn>\n{% endfor %}",
        ),
    ):
        assert pattern_of(published(dict(zip(words, ids)), template), "qwen2") == ids
    ids = np.array([1, 2, 1, 2, 3])
    assert last_occurrence(ids, (1, 2)) == 2 and last_occurrence(ids, (3, 1)) is None
    assert last_occurrence(ids[:1], (1, 2)) is None


def test_output_all_takes_what_score_takes_and_refuses_what_is_not_of_it(tmp_path):
    armorm(tmp_path)
    rm = rmfast.load(tmp_path, device="cpu")
    assert rm.score([], output="all")["gates"].shape == (0, 19)
    assert rm.score(C.PAIRS, output="all", positions=[-2] * 5)["scores"].shape == (5,)
    with pytest.raises(ValueError, match="no normalize"):
        rm.score(C.PAIRS, output="all", normalize=(0, 1))
    with pytest.raises(ValueError, match="output"):
        rm.score(C.PAIRS, output="some")
    plain = rmfast.RewardModel(M.decoder("llama", 3))
    found = plain.score([[1, 2], [3]], output="all")
    assert torch.equal(found["scores"], plain.score([[1, 2], [3]])) and found["names"] == ["0", "1", "2"]
    plain.model.config.id2label = {0: "helpful", 1: "correct", 2: "brief"}
    assert plain.score([[1, 2]], output="all")["names"] == ["helpful", "correct", "brief"]


@pytest.mark.parametrize("norms", [False, True])
def test_qrm_scores_as_published(tmp_path, norms):
    body, tensors = armorm(tmp_path, quantiles=5)
    numbers = GATE
    if norms:  # Linear, ReLU, BatchNorm1d, three times, and a Linear
        tensors = {name: x for name, x in tensors.items() if not name.startswith("gating.layers")}
        numbers = (0, 3, 6, 9)
        for i, number in enumerate(numbers[:3]):
            tensors[f"gating.layers.{number}.weight"] = C.random(32, C.D if i == 0 else 32, seed=i)
            at = f"gating.layers.{number + 2}"
            for j, part in enumerate(("weight", "bias", "running_mean")):
                tensors[f"{at}.{part}"] = C.random(32, seed=i + 10 * j)
            tensors[f"{at}.running_var"] = 0.5 + torch.rand(32, generator=torch.Generator().manual_seed(i))
            tensors[f"{at}.num_batches_tracked"] = torch.tensor(7)
        tensors |= C.linears("gating.layers", 32, 19, numbers=[9], seed=9)
        C.write(tmp_path, body, tensors, num_objectives=19, num_quantiles=5, gating_temperature=0.7)

    def gate(row):
        for number in numbers:
            weight, bias = (tensors.get(f"gating.layers.{number}.{part}") for part in ("weight", "bias"))
            row = functional.linear(row, weight.double(), None if bias is None else bias.double())
            if number == numbers[-1]:
                return row
            row = torch.relu(row)
            if norms:
                parts = [
                    tensors[f"gating.layers.{number + 2}.{part}"].double()
                    for part in ("running_mean", "running_var", "weight", "bias")
                ]
                row = functional.batch_norm(row, *parts)
        return row

    rm = rmfast.load(tmp_path, device="cpu")
    encoded, wanted, quantiles = rm.encode(C.PAIRS), [], []
    for item, x in zip(encoded, C.states(body, encoded)):
        each = (tensors["regression_layer.weight"].double() @ x[-1]).reshape(19, 5)
        gates = (gate(x[gate_at(item.ids)][None])[0] / 0.7).softmax(-1) * 1.25
        adjusted = each.T @ tensors["reward_transform_matrix"].double()
        quantiles.append((gates * adjusted).sum(1))
        wanted.append((gates * (each.mean(1) @ tensors["reward_transform_matrix"].double())).sum())
    C.assert_alike(rm, C.PAIRS, torch.stack(wanted))
    found = rm.score(C.PAIRS, output="all")
    C.assert_near(found["quantiles"], torch.stack(quantiles))
    assert found["rewards"].shape == (5, 19)
    C.assert_near(found["scores"], found["quantiles"].double().mean(1))


def test_urm_scores_as_published(tmp_path):
    body = C.body()
    tensors = {"score.weight": C.random(10, C.D), **C.linears("weights.fc", C.D, 40, 40, 5, numbers=(0, 2, 4), seed=5)}
    # Its own class has the name of one of transformers'.
    C.write(tmp_path, body, tensors, architectures=["LlamaForSequenceClassification"], num_labels=10)
    rm = rmfast.load(tmp_path, device="cpu")

    def formula(x):
        weights = C.layered(tensors, "weights.fc", (0, 2, 4), torch.selu, x[None])[0]
        return ((tensors["score.weight"].double() @ x).view(5, 2)[:, 0] * weights).sum()

    C.assert_alike(rm, C.PAIRS, torch.stack([formula(x[-1]) for x in C.states(body, rm.encode(C.PAIRS))]))
    found = rm.score(C.PAIRS, output="all")
    assert found["names"][0] == "helpsteer-helpfulness" and found["spreads"].shape == found["gates"].shape == (5, 5)


@pytest.mark.parametrize("softmax", [False, True])
def test_ldl_scores_as_published(tmp_path, softmax):
    body = C.body("gemma2")
    bins = C.linears("network", C.D, 40, 40, 220, numbers=(0, 2, 4), seed=5)
    gate = C.linears("network", C.D, 30, 30, 22, numbers=(0, 3, 6), seed=15)
    C.write(
        tmp_path, body, {}, prefix="", files={"regression_layer.pt": bins, "gating_layer.pt": gate},
        architectures=["LDLRewardModel27B"], num_objectives=220, temperature=2.0, softmax=softmax,
    )  # fmt: skip
    rm = rmfast.load(tmp_path, device="cpu")

    def formula(x):
        weights = C.layered(gate, "network", (0, 3, 6), functional.leaky_relu, x[None])
        weights = (weights / 2).softmax(1) if softmax else weights
        each = C.layered(bins, "network", (0, 2, 4), functional.leaky_relu, x[None]).view(1, 22, 10).softmax(-1)
        return (torch.bmm(weights[:, None], each)[0, 0] * torch.linspace(0, 1, 10, dtype=torch.float64)).sum()

    C.assert_alike(rm, C.PAIRS, torch.stack([formula(x[-1]) for x in C.states(body, rm.encode(C.PAIRS))]))
    assert rm.score(C.PAIRS, output="all")["bins"].shape == (5, 22, 10)


def test_gated_heads_of_shapes_that_do_not_fit_are_refused(tmp_path):
    body, tensors = armorm(tmp_path)
    for name, shape, match in (
        ("reward_transform_matrix", (19, 18), r"transform of a gated head to be \(19, 19\)"),
        ("regression_layer.weight", (18, C.D), "num_objectives"),
        ("gating.layers.1.weight", (32, 31), "fit each other"),
    ):
        C.write(tmp_path, body, {**tensors, name: C.random(*shape)}, num_objectives=19)
        with pytest.raises(ValueError, match=match):
            rmfast.load(tmp_path, device="cpu")
