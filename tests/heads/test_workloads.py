"""Lens, attribution, patching and interventions through heads that are programs, against plain hooks and formulas."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import headed as C
import models as M
import numpy as np
import pytest
import torch

import rmfast
from rmfast import DirectionRemoval, NeuronClamp, heads
from rmfast.circuits.circuit import circuit
from rmfast.circuits.edges import edge_attribution
from rmfast.circuits.faithfulness import faithfulness
from rmfast.circuits.nodes import RECEIVERS
from rmfast.circuits.paths import path_patch
from rmfast.last_token import LastTokenRuns
from rmfast.patching.layers_patcher import LayersPatcher
from rmfast.patching.sites import KINDS

A = 6  # attributes


def layers(out, seed=0, activation="relu"):
    weights = [C.random(24, C.D, seed=seed), C.random(out, 24, seed=seed + 1)]
    return heads.Layers(
        weights=weights, biases=[C.random(24, seed=seed + 2), C.random(out, seed=seed + 3)], activation=activation
    )


def gated():
    return heads.Gated(
        weight=C.random(A, C.D), bias=C.random(A, seed=9), transform=torch.eye(A) + 0.3 * C.random(A, A, seed=1),
        gate=layers(A, 3), temperature=0.5,
    )  # fmt: skip


def quantile():
    return heads.Quantile(
        weight=C.random(A * 3, C.D), transform=torch.eye(A), gate=layers(A, 3), temperature=0.5, quantiles=3
    )


HEADS = {
    "linear": lambda: heads.Linear(weight=C.random(2, C.D), bias=C.random(2)),
    "mlp": lambda: heads.MLP(layers=layers(1)),
    "two-way": lambda: heads.TwoWay(layers=layers(2)),
    "gated": gated,
    "quantile": quantile,
    "gaussian": lambda: heads.Gaussian(weight=C.random(2 * A, C.D), gate=layers(A, 5, "selu")),
    "binned": lambda: heads.Binned(layers=layers(A * 10), gate=layers(A, 5), temperature=1.0),
}
LINEAR = ["linear", "gated", "quantile", "gaussian"]


def model(name="gated", family="llama", **kw):
    return rmfast.RewardModel(C.body(family, **kw), M.tokenizer("decoder", chat=True), head=HEADS[name]())


def plain(head, x, gate=None):
    """A head of a row x (d,), by its tensors, fp64; `gate` is the row of the gate."""

    def through(layers, x):
        activation = {"relu": torch.relu, "selu": torch.selu}[layers.activation]
        for i, (weight, bias) in enumerate(zip(layers.weights, layers.biases)):
            x = weight.double() @ (x if i == 0 else activation(x)) + bias.double()
        return x

    if isinstance(head, heads.Linear):
        return head.weight.double() @ x + head.bias.double()
    if isinstance(head, heads.TwoWay):
        return through(head.layers, x).softmax(0)[1:]
    if isinstance(head, heads.MLP):
        return through(head.layers, x)
    if isinstance(head, heads.Gaussian):
        return ((head.weight.double() @ x)[::2] * through(head.gate, x)).sum()[None]
    if isinstance(head, heads.Binned):
        each = through(head.layers, x).reshape(A, 10).softmax(1) @ torch.linspace(0, 1, 10, dtype=torch.float64)
        return (each * through(head.gate, x).softmax(0)).sum()[None]
    weights = (through(head.gate, gate) / head.temperature).softmax(0) * head.scale
    attributes = head.weight.double() @ x + (0 if head.bias is None else head.bias.double())
    if isinstance(head, heads.Quantile):
        attributes = attributes.reshape(A, 3).mean(1)
    return (weights * (attributes @ head.transform.double())).sum()[None]


def gate_of(ids):
    found = [j for j in range(len(ids) - 1) if list(ids[j : j + 2]) == C.PATTERN]
    return found[-1]


@contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def run(rm, ids):
    """Normed states (T, d) of one text by the plain model, fp64."""
    wide = getattr(rm, "_wide", None)
    if wide is None:
        wide = rm._wide = copy.deepcopy(rm.model).double()
    with torch.no_grad():
        return wide(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)


def truth(rm, pair, hook=None, module=None):
    (item,) = rm.encode([pair])
    run(rm, item.ids)
    with hooked(rm._wide.get_submodule(module), hook) if hook else torch.no_grad():
        x = run(rm, item.ids).last_hidden_state[0]
    return plain(rm.binding.program, x[-1], x[gate_of(item.ids)])


def squeezed(rm, x):
    return x[0] if rm.num_labels == 1 else x


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_the_formulas(name, family):
    rm = rmfast.RewardModel(M.decoder(family).base_model, M.tokenizer("decoder", chat=True), head=HEADS[name]())
    C.assert_alike(rm, C.PAIRS, torch.stack([squeezed(rm, truth(rm, pair)) for pair in C.PAIRS]))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_text_has_the_same_bits_in_any_batch_in_every_dtype(name, dtype):
    rm = rmfast.RewardModel(C.body().to(dtype), M.tokenizer("decoder", chat=True), head=HEADS[name]())
    together = rm.score(C.PAIRS)
    assert together.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(together, torch.cat([rm.score([pair]) for pair in C.PAIRS]))
    assert (together - model(name).score(C.PAIRS)).abs().max() < (1e-5 if dtype == torch.float64 else 0.2)


@pytest.mark.parametrize("name", HEADS)
def test_eager_backends_give_the_same_up_to_rounding(name):
    rm = model(name)
    want = rm.score(C.PAIRS).double()
    with rmfast.backend("eager"):
        C.assert_near(rm.score(C.PAIRS), want)


@pytest.mark.parametrize("name", HEADS)
def test_the_lens_puts_the_head_on_every_layer_its_gate_frozen(name):
    rm = model(name)
    found = rm.lens(C.PAIRS)
    C.assert_near(found.rewards[:, -1], rm.score(C.PAIRS).double())
    assert torch.equal(found.scores, rm.score(C.PAIRS))
    for pair, got in zip(C.PAIRS, found.rewards):
        (item,) = rm.encode([pair])
        out = run(rm, item.ids)
        gate = out.last_hidden_state[0, gate_of(item.ids)]
        for layer in range(2):
            x = rm._wide.norm(out.hidden_states[layer])[0, -1]
            C.assert_near(got[layer], squeezed(rm, plain(rm.binding.program, x, gate)))
    every = rm.lens(C.PAIRS[:2], positions="all")
    for got, want in zip(every.scores, rm.token_values(C.PAIRS[:2])):
        C.assert_near(got, want.double())
    C.assert_near(every.rewards[1][:, -1], found.rewards[1].double())


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("norm", ["frozen", "raw"])
def test_the_linear_lens_is_along_the_heads_local_direction(name, norm):
    rm = model(name)
    found = rm.lens(C.PAIRS, norm=norm)
    for pair, got in zip(C.PAIRS, found.rewards):
        (item,) = rm.encode([pair])
        out = run(rm, item.ids)
        x, gate = out.last_hidden_state[0, -1], out.last_hidden_state[0, gate_of(item.ids)]
        streams = []
        with hooked(rm._wide.norm, lambda module, args, out, streams=streams: streams.append(args[0][0, -1])):
            run(rm, item.ids)
        scale = torch.rsqrt(streams[0].square().mean() + 1e-6) if norm == "frozen" else 1.0
        for layer in range(2):
            h = out.hidden_states[layer][0, -1] * scale
            h = h * rm._wide.norm.weight if norm == "frozen" else h
            C.assert_near(got[layer], squeezed(rm, along(rm.binding.program, h, x, gate)))
    if norm == "frozen":
        C.assert_near(found.rewards[:, -1], rm.score(C.PAIRS).double())


def along(head, h, x, gate):
    """The head's linear map with its gate frozen at x, or at the gate's row, of h."""
    if isinstance(head, heads.Gaussian):
        own, zero = copy.copy(head), torch.zeros(2 * A)
        weights = [plain(heads.MLP(layers=head.gate), x)]
        own.bias = zero
        return ((head.weight.double() @ h)[::2] * weights[0]).sum()[None]
    return plain(head, h, gate)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("positions", ["last", "all"])
def test_attribution_sums_to_the_reward(name, positions):
    rm = model(name)
    for pair in C.PAIRS[:3]:
        found = rm.attribute(pair, positions=positions, components=("embedding", "head_out", "mlp_neuron"))
        want = rm.score([pair])[0] if positions == "last" else rm.token_values([pair])[0]
        C.assert_near(found.rewards, want.double())
        C.assert_near(found.total, want.double())


def test_attribution_of_a_gated_head_is_along_its_own_direction_and_not_the_mean_of_its_rows():
    rm = model("gated")
    head, pair = rm.binding.program, C.PAIRS[1]
    (item,) = rm.encode([pair])
    out, streams = run(rm, item.ids), []
    with hooked(rm._wide.norm, lambda module, args, out, streams=streams: streams.append(args[0][0, -1])):
        run(rm, item.ids)
    gate = out.last_hidden_state[0, gate_of(item.ids)]
    hidden = torch.relu(head.gate.weights[0].double() @ gate + head.gate.biases[0].double())
    weights = ((head.gate.weights[1].double() @ hidden + head.gate.biases[1].double()) / head.temperature).softmax(0)
    direction = head.weight.double().T @ head.transform.double() @ weights
    scale = torch.rsqrt(streams[0].square().mean() + 1e-6)
    embedding = out.hidden_states[0][0, -1] * rm._wide.norm.weight * scale
    found = rm.attribute(pair)
    C.assert_near(found.contributions["embedding"], direction @ embedding)
    assert abs(float(found.contributions["embedding"]) - float(head.weight.double().mean(0) @ embedding)) > 0.05
    assert found.rewards.shape == () and found.constant.shape == ()


@pytest.mark.parametrize("name", ["mlp", "two-way", "binned"])
def test_a_head_that_is_no_linear_map_is_refused_by_name_where_one_is_needed(name):
    rm = model(name)
    kind = type(rm.binding.program).__name__
    for ask in (lambda: rm.attribute(C.PAIRS[0]), lambda: rm.lens(C.PAIRS, norm="frozen")):
        with pytest.raises(ValueError, match=f"linear in one token's stream, but for a gate, got {kind}"):
            ask()


def test_features_of_an_autoencoder_are_refused_for_a_mixture_and_not_for_a_linear_head():
    sae = rmfast.SAE(
        W_enc=C.random(C.D, 64),
        b_enc=torch.zeros(64),
        W_dec=C.random(64, C.D),
        b_dec=torch.zeros(C.D),
        architecture="topk",
        k=4,
    )
    with pytest.raises(ValueError, match="got Gated, which mixes attributes"):
        model("gated").sae_attribution(C.PAIRS[0], sae, layer=0, site="resid_post")
    assert model("linear").sae_attribution(C.PAIRS[0], sae, layer=0, site="resid_post").total.shape == (2,)


CLEAN, CORRUPTED = ("what is it?", "it is a dog"), ("what is it!", "it is a cat")


@pytest.mark.parametrize("name", HEADS)
def test_patching_runs_the_whole_program(name):
    rm = model(name, num_hidden_layers=3)
    sweep = rm.patch_sweep(CLEAN, CORRUPTED, sites=("resid_post", "mlp_out"))
    assert sweep.engine == "suffix"
    clean, corrupted = rm.encode([CLEAN, CORRUPTED])
    run(rm, clean.ids)
    changed = np.flatnonzero(clean.ids != corrupted.ids)
    gate = gate_of(clean.ids)
    assert changed[0] < gate < changed[-1]
    for kind, module in (("resid_post", "layers.{}"), ("mlp_out", "layers.{}.mlp")):
        for layer in range(3):
            seen = []
            with hooked(rm._wide.get_submodule(module.format(layer)), lambda m, a, out, seen=seen: seen.append(out)):
                run(rm, clean.ids)
            for position in (int(changed[0]), gate, len(clean) - 1):

                def put(m, a, out, seen=seen, position=position):
                    out = out.clone()
                    out[0, position] = seen[0][0, position]
                    return out

                want = truth(rm, CORRUPTED, put, module.format(layer))
                got = sweep.rewards[("resid_post", "mlp_out").index(kind), layer, position]
                C.assert_near(got, squeezed(rm, want))


@pytest.mark.parametrize("mode", ["denoising", "noising", "zero"])
@pytest.mark.parametrize("name, family", [("gated", "llama"), ("quantile", "gemma2")])
def test_the_suffix_engine_edits_texts_of_two_read_rows_as_hooks_do(name, family, mode, monkeypatch):
    rm = model(name, family, num_hidden_layers=3)
    texts = (CLEAN,) if mode == "zero" else (CLEAN, CORRUPTED)
    asked = {"sites": KINDS, "neurons": [0, 7], "mode": mode}
    found = rm.patch_sweep(*texts, **asked)
    assert found.engine == "suffix"
    again = rm.patch_sweep(*texts, **asked, batch_tokens=60)
    assert torch.equal(again.rewards.nan_to_num(0), found.rewards.nan_to_num(0))
    groups = {"positions": [[0, 4], range(6, 20), [-1], [3, -1]]}
    grouped = rm.patch_sweep(*texts, **asked, **groups)
    monkeypatch.setattr("rmfast.patching.request.patcher_of", lambda scorer: LayersPatcher(scorer.binding))
    for got, more in ((found, {}), (grouped, groups)):
        want = rm.patch_sweep(*texts, **asked, **more)
        assert want.engine == "layers"
        torch.testing.assert_close(got.rewards, want.rewards, rtol=0, atol=1e-5, equal_nan=True)
        C.assert_near(got.clean_reward, want.clean_reward.double())


@pytest.mark.parametrize("through", ["residual", "mlps"])
def test_paths_to_a_reward_of_two_read_rows_are_what_hooks_give(through, monkeypatch):
    rm = model("gated", "gemma2", num_hidden_layers=3)
    asked = {"receivers": RECEIVERS, "positions": [[0, 4, -1], slice(6, 20)], "through": through}
    found = path_patch(rm, CLEAN, CORRUPTED, **asked)
    assert found.engine == "suffix" and (found.effect[:, -1].abs() > 1e-4).any(0).all()
    monkeypatch.setattr("rmfast.patching.request.patcher_of", lambda scorer: LayersPatcher(scorer.binding))
    want = path_patch(rm, CLEAN, CORRUPTED, **asked)
    assert want.engine == "layers"
    torch.testing.assert_close(found.rewards, want.rewards, rtol=0, atol=1e-5, equal_nan=True)


def test_edges_and_circuits_take_the_whole_program_of_a_gated_head():
    rm = model("gated")
    scores = edge_attribution(rm, CLEAN, CORRUPTED, steps=48)
    rewards = rm.score([CLEAN, CORRUPTED])
    np.testing.assert_allclose([scores.clean, scores.corrupted], rewards, atol=1e-5)
    assert float(scores.scores[0].nansum()) == pytest.approx(scores.corrupted - scores.clean, rel=0.02)
    found = faithfulness(rm, circuit(scores, scores.edges), CLEAN, CORRUPTED)
    np.testing.assert_allclose([found.circuit[0, 0], found.none[0]], rewards, atol=1e-5)


def test_a_reward_that_is_read_before_its_prompts_end_is_no_sweeps():
    rm = rmfast.RewardModel(C.body(), M.tokenizer("decoder", chat=True), pooling=M.USER, head=gated())
    with pytest.raises(ValueError, match="text 0 to be read behind its prompt's end"):
        rm.patch_sweep(CLEAN, CORRUPTED)


def test_attribution_patching_takes_the_gradient_of_the_whole_program():
    rm = model("gated")
    exact, linear = (
        ask(CLEAN, CORRUPTED, sites="resid_pre", layers=[0]) for ask in (rm.patch_sweep, rm.attribution_patch)
    )
    (item,) = rm.encode([CORRUPTED])
    run(rm, item.ids)
    wide = rm._wide
    position = int(np.flatnonzero(rm.encode([CLEAN])[0].ids != item.ids)[0])  # before the gate

    def moved(step):
        def shift(module, args, out):
            out = out.clone()
            out[0, position] += step
            return out

        return truth(rm, CORRUPTED, shift, "embed_tokens")

    change = (
        wide.embed_tokens.weight[rm.encode([CLEAN])[0].ids[position]] - wide.embed_tokens.weight[item.ids[position]]
    )
    slope = (moved(1e-3 * change.detach()) - moved(-1e-3 * change.detach())) / 2e-3
    got = linear.rewards[0, position] - linear.corrupted_reward
    assert abs(float(got - slope)) < 2e-3 * max(1.0, abs(float(slope)))
    assert abs(float(exact.rewards[0, position] - exact.corrupted_reward)) > 0


@pytest.mark.parametrize("name", ["gated", "gaussian", "mlp"])
def test_directions_are_removed_from_every_row_that_is_read(name):
    rm = model(name)
    p = torch.nn.functional.normalize(C.random(1, C.D, seed=7), dim=1)
    for side in ("before", "after"):
        removal = DirectionRemoval(p, 1.0, side)
        got = rm.with_interventions(removal).score(C.PAIRS)
        want = []
        for pair in C.PAIRS:
            (item,) = rm.encode([pair])
            run(rm, item.ids)
            q = p.double()

            def take(x, q=q):
                return x - (x @ q.T) @ q

            if side == "after":
                with hooked(rm._wide.norm, lambda module, args, out, take=take: take(out)):
                    x = run(rm, item.ids).last_hidden_state[0]
            else:
                handle = rm._wide.norm.register_forward_pre_hook(lambda module, args, take=take: (take(args[0]),))
                x = run(rm, item.ids).last_hidden_state[0]
                handle.remove()
            want.append(plain(rm.binding.program, x[-1], x[gate_of(item.ids)])[0])
        C.assert_near(got, torch.stack(want))
        both = rm.score(C.PAIRS, interventions=[None, removal])
        C.assert_near(both[0], rm.score(C.PAIRS).double())
        C.assert_near(both[1], got.double())


def clamp(rm, positions):
    names = ["layers.0.mlp.down_proj", "layers.1.mlp.up_proj"]
    return NeuronClamp({name: (torch.tensor([0, 5, 9]), torch.tensor([1.0, -2.0, 0.5])) for name in names}, positions)


@pytest.mark.parametrize("name", ["gated", "gaussian"])
@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_clamps_at_the_last_token_leave_the_gate_alone(name, engine):
    rm = model(name)
    for positions in ("last", "all"):
        value = clamp(rm, positions)
        got = rm.with_interventions(value).score(C.PAIRS, engine=engine)
        want = []
        for pair in C.PAIRS:
            (item,) = rm.encode([pair])
            run(rm, item.ids)
            handles = []
            for module, (at, to) in value.neurons.items():

                def put(m, a, out, at=at, to=to, positions=positions):
                    out = out.clone()
                    if positions == "last":
                        out[0, -1, at] = to.to(out)
                    else:
                        out[..., at] = to.to(out)
                    return out

                handles.append(rm._wide.get_submodule(module).register_forward_hook(put))
            x = run(rm, item.ids).last_hidden_state[0]
            for handle in handles:
                handle.remove()
            want.append(plain(rm.binding.program, x[-1], x[gate_of(item.ids)])[0])
        C.assert_near(got, torch.stack(want))


@pytest.mark.parametrize("name", ["gated", "quantile", "mlp"])
@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_reruns_of_the_last_token_are_scores_under_the_clamp(name, engine, monkeypatch):
    rm = model(name)
    if engine == "padded":
        monkeypatch.setattr(rm, "packed_engine", lambda: "it is asked not to")
    p = torch.nn.functional.normalize(C.random(1, C.D, seed=7), dim=1)
    runs = LastTokenRuns(rm, C.PAIRS)
    C.assert_near(runs.rewards()[:, 0], rm.score(C.PAIRS).double())
    for value in (clamp(rm, "last"), clamp(rm, "last") + DirectionRemoval(p)):
        C.assert_near(runs.rewards(value)[:, 0], rm.with_interventions(value).score(C.PAIRS).double())
    assert LastTokenRuns(rm, []).rewards().shape == (0, 1)


def test_one_tokens_stream_alone_has_no_reward_where_the_head_reads_two():
    rm = model("gated")
    with rm.binding.session(), pytest.raises(ValueError, match="Gated reads two tokens"):
        rm.binding.rewards(torch.zeros(1, 1, C.D), torch.zeros(1, dtype=torch.int64))


def test_a_head_that_pools_is_refused_where_a_token_is_needed():
    rm = rmfast.RewardModel(C.body(), head=heads.FunctionHead(of=lambda x: x.mean(), reads="text"))
    texts = [[1, 2, 3], [4, 5, 6]]
    for ask in (
        lambda: rm.lens(texts),
        lambda: rm.attribute(texts[0]),
        lambda: rm.patch_sweep(*texts),
        lambda: LastTokenRuns(rm, texts),
        lambda: rm.with_interventions(clamp(rm, "last")),
        lambda: rm.values_and_reward(texts, response_start=[1, 1]),
    ):
        with pytest.raises(ValueError):
            ask()
    whole = rm.with_interventions(clamp(rm, "all"))
    assert (whole.score(texts) != rm.score(texts)).any()


def test_training_values_come_from_the_tokens_of_a_gated_head():
    rm = model("gated")
    found = rm.values_and_reward(C.PAIRS)
    C.assert_near(found.reward, rm.score(C.PAIRS).double())


def test_reports_of_biases_take_a_gated_head():
    rm = model("gated")
    pairs = [("q" * (i % 3 + 1), "a" * i, "b " * i) for i in range(1, 14)]
    assert rmfast.debias.report(rm, pairs) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_has_the_same_bits_in_any_batch_under_a_gate_as_wide_as_published_ones(dtype):
    weights = [C.random(96, C.D), C.random(96, 96, seed=1), C.random(A, 96, seed=2)]
    gate = heads.Layers(weights=weights, biases=[C.random(96, seed=3), C.random(96, seed=4), None])
    head = heads.Gated(weight=C.random(A, C.D), transform=torch.eye(A), gate=gate, temperature=0.5)
    rm = rmfast.RewardModel(C.body().to(dtype), M.tokenizer("decoder", chat=True), head=head)
    together = rm.score(C.PAIRS)
    assert torch.equal(together, torch.cat([rm.score([pair]) for pair in C.PAIRS]))
    assert torch.equal(together, rm.score(C.PAIRS, batch_tokens=16))
    if dtype == torch.float32:
        (item,) = rm.encode([C.PAIRS[0]])
        x = run(rm, item.ids).last_hidden_state[0]
        row = x[gate_of(item.ids)]
        for i, (weight, bias) in enumerate(zip(gate.weights, gate.biases)):
            row = weight.double() @ (row if i == 0 else torch.relu(row)) + (0 if bias is None else bias.double())
        want = ((row / 0.5).softmax(0) * (head.weight.double() @ x[-1])).sum()
        C.assert_near(together[0], want)
