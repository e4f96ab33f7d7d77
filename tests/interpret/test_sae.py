"""SAE features: folders as SAELens writes them, and contributions against the plain formulas on hooks' streams."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import models as M
import numpy as np
import oracle as O
import pytest
import torch
from frozen import IDS, head, model, slope
from safetensors.torch import save_file
from torch import nn

import rmfast
from rmfast.interpret.sae_attribution import _ELEMENTS

D, F, K = 48, 200, 9
ARCHITECTURES = ("standard", "topk", "jumprelu")


def weights(d: int = D, features: int = F, dtype=torch.float32, threshold: bool = False, seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    out = {
        name: torch.randn(shape, generator=draw).to(dtype)
        for name, shape in (("W_enc", (d, features)), ("b_enc", (features,)), ("W_dec", (features, d)), ("b_dec", (d,)))
    }
    return {**out, "threshold": torch.rand(features, generator=draw).to(dtype)} if threshold else out


def config(architecture: str, **changes) -> dict:
    """cfg.json of SAELens 6."""
    base = {
        "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "architecture": architecture,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post", "model_name": "m"},
    }  # fmt: skip
    return base | ({"k": K, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}) | changes


def folder(path, cfg: dict, tensors: dict | None = None):
    (path / "cfg.json").write_text(json.dumps(cfg))
    if tensors is None:
        tensors = weights(threshold=cfg.get("architecture") == "jumprelu")
    save_file({name: x.contiguous() for name, x in tensors.items()}, path / "sae_weights.safetensors")
    return path


def load(path, architecture: str = "topk", **changes):
    return rmfast.SAE.load(folder(path, config(architecture, **changes)))


def by_formula(x, w: dict, cfg: dict):
    """Features (N, F) and reconstruction (N, d) as SAELens computes them, in float64."""
    w = {name: value.double() for name, value in w.items()}
    x = given = x.double()
    mean, size = 0, 1
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        size = (x - mean).std(-1, keepdim=True)
        given = (x - mean) / (size + 1e-5)
    elif cfg["normalize_activations"] == "constant_norm_rescale":
        size = x.norm(dim=-1, keepdim=True) / cfg["d_in"] ** 0.5
        given = x / size
    pre = (given - w["b_dec"] * cfg["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"]
    norm = w["W_dec"].norm(dim=-1) if cfg.get("rescale_acts_by_decoder_norm") else 1
    if cfg["architecture"] == "topk":
        best = (pre * norm).topk(cfg["k"])
        features = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    else:
        features = pre.relu() * (pre > w["threshold"] if cfg["architecture"] == "jumprelu" else 1)
    return features, (features / norm @ w["W_dec"] + w["b_dec"]) * size + mean


# Loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"apply_b_dec_to_input": False}, {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"}, {"rescale_acts_by_decoder_norm": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_those_of_the_formula(architecture, changes, tmp_path):
    if "rescale_acts_by_decoder_norm" in changes and architecture != "topk":
        pytest.skip("an option of topk alone")
    cfg = config(architecture, **changes)
    w = weights(threshold=architecture == "jumprelu")
    sae = rmfast.SAE.load(folder(tmp_path, cfg, w))
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(1)) * 3 + 0.5
    torch.testing.assert_close(sae.encode(x).double(), by_formula(x, w, cfg)[0], rtol=1e-4, atol=1e-4)


def test_a_folder_of_before_version_6(tmp_path):
    old = {
        "architecture": "standard", "d_in": D, "d_sae": F, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "hook_point": "blocks.2.hook_mlp_out", "hook_point_head_index": None, "normalize_activations": False,
        "dtype": "torch.float32", "finetuning_scaling_factor": False, "prepend_bos": True, "lr": 1e-4,
    }  # fmt: skip
    sae = rmfast.SAE.load(folder(tmp_path, old, {**weights(), "scaling_factor": torch.ones(F)}))
    assert (sae.architecture, sae.k, sae.hook_name) == ("topk", 5, "blocks.2.hook_mlp_out")
    assert repr(sae) == "SAE(topk 5, 48 -> 200, float32, hook_name='blocks.2.hook_mlp_out')"


def test_thresholds_may_be_kept_as_logarithms(tmp_path):
    w = weights(threshold=True)
    log = {**{name: x for name, x in w.items() if name != "threshold"}, "log_threshold": w["threshold"].log()}
    sae = rmfast.SAE.load(folder(tmp_path, config("jumprelu"), log))
    torch.testing.assert_close(sae.threshold, w["threshold"])


def test_the_dtype_is_the_configuration_s_or_the_one_asked_for(tmp_path):
    path = folder(tmp_path, config("topk", dtype="bfloat16"))
    assert rmfast.SAE.load(path).W_enc.dtype == torch.bfloat16
    assert rmfast.SAE.load(path, dtype="torch.float16").W_enc.dtype == torch.float16
    assert rmfast.SAE.load(path, dtype="float64").b_dec.dtype == torch.float64


@pytest.mark.parametrize("cfg, message", [
    (config("gated"), "architecture to be one of standard, topk, jumprelu, got 'gated'"),
    (config("standard", activation_fn="tanh-relu"), "activation_fn to be one of relu, got 'tanh-relu'"),
    (config("standard", normalize_activations="expected_average_only_in"), "'expected_average_only_in' to be folded"),
    (config("standard", normalize_activations=True), "'expected_average_only_in' to be folded"),
    (config("standard", normalize_activations="unit"), "normalize_activations to be one of none, layer_norm"),
    (config("standard", reshape_activations="hook_z"), "reshape_activations to be one of none, got 'hook_z'"),
    (config("standard", finetuning_scaling_factor=True), "an SAE without finetuning_scaling_factor, got True"),
    (config("standard", hook_head_index=3), "an SAE without hook_head_index, got 3"),
    (config("standard", hook_head_index=0), "an SAE without hook_head_index, got 0"),
    (config("standard", dtype="int8"), "dtype to be one of float64, float32, bfloat16, float16, got 'int8'"),
    (config("topk", k=0), "k to be an int from 1 to 200, got 0"),
    (config("topk", k=True), "k to be an int from 1 to 200, got True"),
    (config("topk", k=201), "k to be an int from 1 to 200, got 201"),
    (config("standard", d_in=64), "W_enc to have shape (d_in, d_sae) = (64, 200) of cfg.json, got (48, 200)"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_what_is_not_supported_is_named(cfg, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        rmfast.SAE.load(folder(tmp_path, cfg))


def test_a_configuration_that_can_not_be_read_is_named(tmp_path):
    path = folder(tmp_path, config("topk"))
    for text, message in (("{", "cfg.json is no JSON"), ("[]", "cfg.json to hold an object, got list")):
        (path / "cfg.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            rmfast.SAE.load(path)


def test_files_and_weights_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no SAE that SAELens saved: it has no cfg\.json"):
        rmfast.SAE.load(tmp_path)
    with pytest.raises(
        ValueError, match="jumprelu SAE to hold W_enc, b_enc, W_dec, b_dec, threshold, got W_dec, W_enc"
    ):
        rmfast.SAE.load(folder(tmp_path, config("jumprelu"), weights()))
    wrong = {**weights(), "W_dec": torch.ones(D, F)}
    with pytest.raises(ValueError, match=re.escape("Expected W_dec to have shape (200, 48), got (48, 200)")):
        rmfast.SAE.load(folder(tmp_path, config("standard"), wrong))


# Contributions --------------------------------------------------------------------------------------------------------


def terms(found):
    """(total, its parts summed)."""
    parts = found.contributions.double().sum(-1 - found.constant.dim()) + found.rest + found.b_dec + found.error
    return found.total.double(), parts


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_contributions_are_those_of_the_formula(family, architecture, normalize, tmp_path):
    m = model(family, torch.float32)
    cfg = config(architecture, normalize_activations=normalize)
    w = weights(threshold=architecture == "jumprelu")
    sae = rmfast.SAE.load(folder(tmp_path, cfg, w))
    found = rmfast.RewardModel(m).sae_attribution(IDS, sae, positions="all", top=F)
    h = O.activation(m, IDS, "resid_post", 1)[:, 0].detach().double()
    features, reconstruction = by_formula(h, w, cfg)
    direction = slope(m, IDS)[0].double()  # (T, d), the norm's scale in it
    size = h.norm(dim=-1, keepdim=True) / D**0.5 if normalize == "constant_norm_rescale" else 1
    size = h.std(-1, keepdim=True) if normalize == "layer_norm" else size
    want = features * size * (direction @ w["W_dec"].double().T)
    scale = float(want.abs().max())
    got = torch.zeros(len(IDS), F).scatter(1, found.features, found.contributions)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4 * scale)
    active = torch.zeros(len(IDS), F).scatter(1, found.features, found.activations)
    torch.testing.assert_close(active.double(), features, rtol=0, atol=1e-4 * float(features.max()))
    error = ((h - reconstruction) * direction).sum(-1)
    torch.testing.assert_close(found.error.double(), error, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(found.total.double(), (h * direction).sum(-1), rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_parts_add_up_to_the_reward_after_the_last_layer(architecture, positions, labels, tmp_path):
    rm = rmfast.RewardModel(model("llama", torch.float32, labels=labels))
    found = rm.sae_attribution(IDS, load(tmp_path, architecture), layer=2, positions=positions, top=4)
    total, parts = terms(found)
    torch.testing.assert_close(parts, total, rtol=1e-4, atol=1e-4)
    assert found.contributions.shape[: 2 if positions == "all" else 1] == ((21, 4) if positions == "all" else (4,))
    torch.testing.assert_close(found.total + found.constant, found.rewards, rtol=1e-5, atol=1e-5)
    want = rm.token_values([IDS])[0] if positions == "all" else rm.score([IDS])[0]
    torch.testing.assert_close(found.rewards, want, rtol=1e-5, atol=1e-5)


def test_other_sites_have_the_total_of_attribute(tmp_path):
    rm = rmfast.RewardModel(model("gemma2", torch.float32))
    parts = rm.attribute(IDS)
    for site in ("attn_out", "mlp_out"):
        found = rm.sae_attribution(IDS, load(tmp_path, "standard"), layer=1, site=site)
        torch.testing.assert_close(found.total, parts.of(site)[1], rtol=1e-5, atol=1e-5)
    frozen = rm.lens([IDS], norm="frozen").rewards[0]
    for layer, site in ((1, "resid_pre"), (2, "resid_post")):
        found = rm.sae_attribution(IDS, load(tmp_path), layer=layer, site=site)
        at = layer + (site == "resid_post")
        torch.testing.assert_close(found.total + found.constant, frozen[at], rtol=1e-4, atol=1e-4)


def test_the_last_token_is_that_of_all_tokens(tmp_path):
    rm = rmfast.RewardModel(model("llama", torch.float32))
    sae = load(tmp_path)
    last, every = rm.sae_attribution(IDS, sae), rm.sae_attribution(IDS, sae, positions="all")
    assert torch.equal(last.features, every.features[last.read])
    torch.testing.assert_close(last.contributions, every.contributions[last.read], rtol=1e-5, atol=1e-6)


def test_raw_leaves_the_final_norm_out(tmp_path):
    m = model("llama", torch.float32)
    found = rmfast.RewardModel(m).sae_attribution(IDS, load(tmp_path), norm="raw")
    h = O.activation(m, IDS, "resid_post", 1)[-1, 0].detach()
    torch.testing.assert_close(found.total, (head(m).weight @ h)[0].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_top_leaves_out_is_in_the_rest(architecture, tmp_path):
    rm = rmfast.RewardModel(model("llama", torch.float32, labels=2))
    sae = load(tmp_path, architecture)
    some, all_of_them = (rm.sae_attribution(IDS, sae, top=top) for top in (3, F))
    assert torch.equal(some.features, all_of_them.features[:3])
    assert (all_of_them.contributions.abs().amax(-1).diff() <= 0).all() and (all_of_them.rest == 0).all()
    torch.testing.assert_close(some.rest, all_of_them.contributions[3:].sum(0), rtol=1e-4, atol=1e-4)


def test_features_are_made_some_rows_at_a_time(tmp_path, monkeypatch):
    rm = rmfast.RewardModel(model("llama", torch.float32))
    sae = load(tmp_path, "jumprelu")
    whole = rm.sae_attribution(IDS, sae, positions="all")
    monkeypatch.setitem(_ELEMENTS, "cpu", 5 * F)
    parts = rm.sae_attribution(IDS, sae, positions="all")
    torch.testing.assert_close(parts.contributions, whole.contributions, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compute", ["native", "fp32"])
def test_16_bit_models_and_saes(tmp_path, compute):
    m = model("llama", torch.bfloat16)
    found = rmfast.RewardModel(m, compute=compute).sae_attribution(
        IDS, load(tmp_path, dtype="bfloat16"), positions="all"
    )
    assert found.contributions.dtype == torch.float32
    total, parts = terms(found)
    torch.testing.assert_close(parts, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hook, place", [
    ("blocks.0.hook_resid_pre", (0, "resid_pre")), ("blocks.2.hook_mlp_out", (2, "mlp_out")),
    ("blocks.1.hook_out", (1, "resid_post")), ("model.layers.2", (2, "resid_post")),
    ("transformer.h.1", (1, "resid_post")),
])  # fmt: skip
def test_the_hook_s_name_says_where(hook, place, tmp_path):
    rm = rmfast.RewardModel(model("llama", torch.float32))
    sae = load(tmp_path, metadata={"hook_name": hook})
    found = rm.sae_attribution(IDS, sae)
    assert (found.layer, found.site) == place
    assert rm.sae_attribution(IDS, sae, layer=1).layer == 1


# The result -----------------------------------------------------------------------------------------------------------


def test_a_list_gives_one_result_for_each_text_and_nothing_stays_in_the_model(tmp_path):
    m = model("llama", torch.float32)
    before = [(len(x._forward_hooks), len(x._forward_pre_hooks)) for x in m.modules()]
    texts = M.token_ids([5, 9], seed=1)
    found = rmfast.RewardModel(m).sae_attribution(texts, load(tmp_path))
    assert [x.token_ids for x in found] == texts
    assert [(len(x._forward_hooks), len(x._forward_pre_hooks)) for x in m.modules()] == before


def test_no_texts_have_no_results(tmp_path):
    assert rmfast.RewardModel(model("llama", torch.float32)).sae_attribution([], load(tmp_path)) == []


def test_a_decoder_may_be_the_transposed_encoder():
    w = weights()
    rm = rmfast.RewardModel(model("llama", torch.float32))
    tied, copied = (
        rmfast.SAE(
            architecture="topk", k=np.int64(K), W_enc=w["W_enc"], b_enc=w["b_enc"], W_dec=W_dec, b_dec=w["b_dec"]
        )
        for W_dec in (w["W_enc"].T, w["W_enc"].T.contiguous())
    )
    found, want = (rm.sae_attribution(IDS, sae, layer=1, site="resid_post") for sae in (tied, copied))
    assert torch.equal(found.contributions, want.contributions) and torch.equal(found.features, want.features)


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("layer, site", [
    (0, "resid_pre"), (1, "resid_pre"), (0, "resid_post"), (2, "resid_post"), (1, "resid_mid"), (1, "attn_out"),
    (1, "mlp_out"),
])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_each_text_of_a_list_has_the_features_that_it_has_alone(family, layer, site, positions, tmp_path):
    m = model(family, torch.float32)
    rm, sae = rmfast.RewardModel(m), load(tmp_path)
    options = {"layer": layer, "site": site, "positions": positions}
    texts = M.token_ids([5, 9, 17], seed=1)
    texts.append(texts[2][:15] + texts[0])  # a beginning that is run once
    for found, text in zip(rm.sae_attribution(texts, sae, **options), texts, strict=True):
        want = (O.activation(m, text, site, layer)[:, 0].detach() * slope(m, text)[0]).sum(-1)  # (T,)
        torch.testing.assert_close(found.total, want if positions == "all" else want[-1], rtol=1e-4, atol=1e-4)
        alone = rm.sae_attribution(text, sae, **options)
        assert found.token_ids == text and found.read == alone.read == len(text) - 1
        total, parts = terms(found)
        torch.testing.assert_close(parts, total, rtol=1e-4, atol=1e-4)
        for name in ("total", "rest", "b_dec", "error", "rewards"):
            torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-4, atol=1e-4)
        # Features of nearly the same contribution may change places.
        for x in (found, alone):
            x.contributions, x.activations = (y.sort(-1).values for y in (x.contributions, x.activations))
        torch.testing.assert_close(found.contributions, alone.contributions, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.activations, alone.activations, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_table_has_a_row_for_each_active_feature(positions, labels, tmp_path):
    pytest.importorskip("pandas")
    rm = rmfast.RewardModel(model("llama", torch.float32, labels=labels), M.tokenizer())
    found = rm.sae_attribution("abc", load(tmp_path), positions=positions)
    table = found.to_dataframe()
    assert len(table) == int((found.activations != 0).sum()) * labels
    assert list(table)[:4] == ["position", "token", "feature", "activation"]
    first = table.iloc[0]
    values = found.contributions.reshape(-1, K, labels)
    assert first.feature == found.features.reshape(-1, K)[0, 0] and first.contribution == float(values[0, 0, 0])
    assert set(table.token) <= set(found.tokens) and ("label" in table) == (labels > 1)
    assert set(table.position) == ({3} if positions == "last" else {0, 1, 2, 3})


@pytest.mark.parametrize("positions", ["last", "all"])
def test_plots_name_the_features(positions, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    rm = rmfast.RewardModel(model("llama", torch.float32), M.tokenizer())
    found = rm.sae_attribution("abc", load(tmp_path), positions=positions)
    ax = found.plot(top=5)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert len(names) == 5 and ax.get_title() == "resid_post of layer 1"
    if positions == "last":
        assert names[-1] == str(int(found.features[0]))
        assert repr(found) == (
            "SAEAttribution(9 features of resid_post of layer 1, norm 'frozen', at token 3 'c' of 4)"
        )


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, kind, message", [
    ({"sae": "folder"}, TypeError, "sae to be a rmfast.SAE (rmfast.SAE.load(folder)), got str"),
    ({"layer": 3}, ValueError, "layer to be an int from 0 to 2, got 3"),
    ({"layer": "1"}, TypeError, "layer to be an int, got '1'"),
    ({"layer": -1}, ValueError, "layer to be an int from 0 to 2, got -1"),
    ({"site": "head_out"}, ValueError, "site to be one of resid_pre, resid_mid, resid_post, attn_out, mlp_out, got 'h"),
    ({"positions": "joint"}, ValueError, 'positions to be "last" or "all", got \'joint\''),
    ({"norm": "final"}, ValueError, 'norm to be "frozen" or "raw", got \'final\''),
    ({"top": 0}, ValueError, "top to be a positive int, got 0"),
])  # fmt: skip
def test_wrong_arguments_are_named(options, kind, message, tmp_path):
    rm = rmfast.RewardModel(model("llama", torch.float32))
    with pytest.raises(kind, match=re.escape(message)):
        rm.sae_attribution(IDS, **{"sae": load(tmp_path), **options})


def test_an_sae_of_another_width_is_refused_with_both_widths(tmp_path):
    w = weights(d=64)
    sae = rmfast.SAE.load(folder(tmp_path, config("topk", d_in=64), w))
    rm = rmfast.RewardModel(model("llama", torch.float32))
    with pytest.raises(ValueError, match=re.escape("the model's width, 48 (hidden_size of LlamaFor")) as error:
        rm.sae_attribution(IDS, sae)
    assert "got one of width 64 (d_in)" in str(error.value)


def test_a_hook_that_names_no_place_needs_a_layer_and_a_site(tmp_path):
    rm = rmfast.RewardModel(model("llama", torch.float32))
    sae = load(tmp_path, metadata={"hook_name": "blocks.1.attn.hook_z"})
    with pytest.raises(
        ValueError, match=r"Expected layer, since the SAE's hook_name, 'blocks\.1\.attn\.hook_z', names"
    ):
        rm.sae_attribution(IDS, sae)
    with pytest.raises(ValueError, match=r"Expected site, one of resid_pre, .*'blocks\.1\.attn\.hook_z', names none"):
        rm.sae_attribution(IDS, sae, layer=0)
    found = rm.sae_attribution(IDS, sae, layer=0, site="attn_out")
    assert (found.layer, found.site) == (0, "attn_out")
    assert rm.sae_attribution(IDS, replace(sae, hook_name=None), layer=0).site == "resid_post"


def test_models_whose_reward_is_no_such_sum_are_refused(tmp_path):
    sae = load(tmp_path)
    with pytest.raises(ValueError, match="layers that add their attention and MLP to the residual stream"):
        rmfast.RewardModel(M.encoder("Bert", task="TokenClassification")).sae_attribution(IDS, sae)
    with pytest.raises(ValueError, match=re.escape("to be a single nn.Linear")):
        rmfast.RewardModel(M.mlp_head(model("llama", torch.float32))).sae_attribution(IDS, sae)


def test_models_with_hooks_are_read_as_they_run(tmp_path):
    m = model("llama", torch.float32)
    m.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    rm = rmfast.RewardModel(m)
    found = rm.sae_attribution(IDS, load(tmp_path), layer=2)
    torch.testing.assert_close(found.total + found.constant, rm.score([IDS])[0], rtol=1e-5, atol=1e-5)
    assert isinstance(m.model.layers[1].mlp, nn.Module)
