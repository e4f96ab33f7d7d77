"""reward-lens with `rmfast.integrations.reward_lens` on, against itself with it off: `make test-reward-lens`."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace

import models as M
import numpy as np
import pytest
import torch

import rmfast.integrations.reward_lens as integration
from rmfast.integrations.reward_lens import bound

reward_lens = pytest.importorskip("reward_lens", reason="reward-lens is not installed")

from reward_lens.measure.base import Context, run  # noqa: E402
from reward_lens.measure.battery.patch import PatchGrid  # noqa: E402
from reward_lens.model import RewardModel  # noqa: E402
from reward_lens.runtime.hf import HFRuntime  # noqa: E402
from reward_lens.signals.conformance import run_conformance  # noqa: E402
from reward_lens.signals.loaders import from_tiny, wrap_hf_model  # noqa: E402

old = pytest.mark.skipif(not reward_lens.__version__.startswith("2."), reason="reward-lens 3 has no such class")

PROMPT = "How was it, on the whole?"
PAIRS = [
    (PROMPT, "A wonderful film!", "A terrible  film!"),  # of one length
    (PROMPT, "Good.", "A long and dull answer to what was asked."),
    (PROMPT, "A long and kind answer to what was asked.", "Bad."),
]
TEXTS = [(PROMPT, answer) for pair in PAIRS for answer in pair[1:]]


def tokenizer():
    return M.tokenizer(kind="plain", chat=True)


def signal(family: str = "llama", **kw):
    return wrap_hf_model(M.decoder(family, num_hidden_layers=3, **kw), tokenizer(), conformance_quickcheck=False)


def wrapper(family: str = "llama", **kw):
    from reward_lens.model_adapters import get_adapter

    model = M.decoder(family, num_hidden_layers=3, **kw)
    return RewardModel(model, tokenizer(), get_adapter(model), torch.device("cpu"))


def both(call):
    """What a call gives without the integration and with it, and what the integration says of that."""
    without = call()
    with integration.enable():
        within = call()
        said = integration.explain()
    return without, within, said


def near(got, want, model) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * M.reward_scale(model))


# Its runtime ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral"])
def test_scores(family):
    s = signal(family)
    without, within, said = both(lambda: s.score(TEXTS).value.values)
    near(within, without, s.runtime.model)
    assert "final_head_inputs: 1 × rmfast" in said


@pytest.mark.parametrize("readout", ["reward", "criterion:1"])
def test_scores_of_several_labels(readout):
    s = signal(labels=3)
    without, within, _ = both(lambda: s.score(TEXTS, readout).value.values)
    near(within, without, s.runtime.model)


def test_prefix_scores():
    s = signal()
    without, within, said = both(lambda: s.score_prefixes(TEXTS).value.curves)
    assert "full_head_inputs: 1 × rmfast" in said
    for got, want in zip(within, without, strict=True):
        near(got, want, s.runtime.model)


def test_head_inputs_have_the_trunks_dtype_and_are_ordinary_tensors():
    s = signal()
    s.runtime.model.bfloat16()
    with integration.enable():
        rows = s.runtime.final_head_inputs([s.tokenize(text) for text in TEXTS])
    assert rows.dtype == torch.bfloat16 and rows.shape == (len(TEXTS), 48) and not rows.is_inference()


def test_head_inputs_of_a_collated_batch_stand_where_it_has_them():
    s = signal()
    batch = s.runtime.collate([s.tokenize(text) for text in TEXTS])
    (without, at), (within, same), _ = both(lambda: s.runtime.full_head_inputs(batch))
    assert at == same and within.shape == without.shape
    for row, columns in enumerate(at):
        torch.testing.assert_close(within[row, columns], without[row, columns], rtol=0, atol=1e-5)
    assert not within[batch.attention_mask == 0].any()


def test_its_conformance_checks_pass():
    with integration.enable():
        report = run_conformance(from_tiny())
        said = integration.explain()
    assert report.passed and not report.n_skipped, report.summary()
    assert "HFRuntime.final_head_inputs" in said and "reward-lens itself" not in said


# PatchGrid ------------------------------------------------------------------------------------------------------------


def grids(s, granularity: str, pairs=PAIRS, readout: str = "reward"):
    return run(PatchGrid(granularity), Context(signal=s, view=pairs, readout=readout)).value


def same_grid(without, within, model) -> None:
    for name in ("per_pair_effect", "original_differential", "mean_effect", "mean_abs_effect", "max_abs_effect"):
        near(within[name], without[name], model)
    for name in ("granularity", "component_names", "n_pairs"):
        assert within[name] == without[name]
    assert within.keys() == without.keys()


@pytest.mark.parametrize("granularity", ["component", "head"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen3", "phi3", "gpt2"])
def test_grids(family, granularity):
    if family == "gpt2" and granularity == "head":
        pytest.skip("reward-lens finds no heads in GPT-2")
    s = signal(family)
    without, within, said = both(lambda: grids(s, granularity))
    same_grid(without, within, s.runtime.model)
    assert "PatchGrid.measure: 1 × rmfast" in said, said


def test_a_grid_of_one_of_several_labels():
    s = signal(labels=3)
    for readout in ("criterion:2", "reward"):
        without, within, said = both(lambda readout=readout: grids(s, "component", readout=readout))
        same_grid(without, within, s.runtime.model)
        assert "PatchGrid.measure: 1 × rmfast" in said


def test_a_grid_of_texts_that_are_the_same_or_one_the_beginning_of_the_other():
    s = signal()
    s.tokenizer.chat_template = "{{ messages[0]['content'] }}{{ messages[1]['content'] }}"
    pairs = [(PROMPT, "Good.", "Good."), (PROMPT, "Good", "Good film"), (PROMPT, "Good film", "Good")]
    without, within, said = both(lambda: grids(s, "head", pairs))
    same_grid(without, within, s.runtime.model)
    assert "PatchGrid.measure: 1 × rmfast" in said


# What its own code runs -----------------------------------------------------------------------------------------------


def ablated(s):
    from reward_lens.core.types import Site

    return s.with_interventions(SimpleNamespace(site=Site(1, "mlp_out"), apply=torch.zeros_like, fingerprint="zero"))


@pytest.mark.parametrize(
    "changed, why",
    [
        (lambda s: s.runtime.model.model.layers[1].register_forward_hook(lambda *a: None), "hooks on model.layers.1"),
        (lambda s: s.runtime.model.train(), "the model is in training mode"),
        (lambda s: ablated(s), "hooks on"),
        (lambda s: setattr(s.runtime, "head_module", s.runtime.model.model.norm), "the head is not one module"),
    ],
)
def test_scores_that_need_its_own_code(changed, why):
    s = signal()
    made = changed(s)
    s = made if isinstance(made, type(s)) else s
    without, within, said = both(lambda: s.score(TEXTS).value.values)
    np.testing.assert_array_equal(within, without)
    assert f"reward-lens itself ({why}" in said


def test_padding_that_changes_its_numbers_is_its_own():
    s = signal("gpt2")  # learned positions, which padding on the left shifts
    without, within, said = both(lambda: s.score(TEXTS).value.values)
    np.testing.assert_array_equal(within, without)
    assert "positions are learned" in said
    without, within, said = both(lambda: s.score(TEXTS[:2]).value.values)
    near(within, without, s.runtime.model)
    assert "final_head_inputs: 1 × rmfast" in said


def test_a_grid_under_interventions_is_its_own():
    s = ablated(signal())
    without, within, said = both(lambda: grids(s, "component", PAIRS[:1]))
    assert within == without and "PatchGrid.measure: 1 × reward-lens itself (interventions on the signal)" in said


# 2.0.1: caches, attribution and its patcher ---------------------------------------------------------------------------


def test_activations_of_its_forward_with_cache():
    w = wrapper()
    (reward, cache), (same, ours), said = both(lambda: w.forward_with_cache(*TEXTS[0], cache_full_sequences=True))
    near(same, reward, w.model)
    assert "RewardModel._forward_with_cache_from_inputs: 1 × rmfast" in said
    for name, want in vars(cache).items():
        got = getattr(ours, name)
        pairs = [(got, want)] if isinstance(want, torch.Tensor) else [(got[key], want[key]) for key in want]
        assert isinstance(want, torch.Tensor) or got.keys() == want.keys()
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
            assert not a.is_inference()


@old
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("method", ["attribute", "attribute_heads"])
def test_component_attribution(method, family):
    w = wrapper(family)
    attribution = reward_lens.ComponentAttribution(w)
    without, within, said = both(lambda: getattr(attribution, method)(*PAIRS[1]))
    for name in ("contributions_preferred", "contributions_dispreferred", "differential_contributions"):
        near(getattr(within, name), getattr(without, name), w.model)
    assert within.component_names == without.component_names and within.layer_indices == without.layer_indices
    near(within.total_reward_preferred, without.total_reward_preferred, w.model)
    assert ("reward-lens itself" in said) == (family == "gemma2"), said  # it reads attention before the norm behind it


@old
@pytest.mark.parametrize("pair", PAIRS, ids=["equal", "shorter", "longer"])
@pytest.mark.parametrize("mode", ["noising", "denoising", "zero", "mean", "head-noising", "head-denoising"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_activation_patcher(family, mode, pair):
    w = wrapper(family)
    patcher = reward_lens.ActivationPatcher(w)
    options = {"mode": mode.removeprefix("head-"), "show_progress": False}
    name = "patch_all_heads" if mode.startswith("head-") else "patch_all_components"
    if mode == "mean":
        options["mean_corpus"] = TEXTS
    without, within, said = both(lambda: getattr(patcher, name)(*pair, **options))
    near(within.patch_effects, without.patch_effects, w.model)
    near(within.original_differential, without.original_differential, w.model)
    for field in ("component_names", "component_types", "layer_indices", "patching_mode"):
        assert getattr(within, field) == getattr(without, field), field
    # Means are taken before the norm that Gemma has behind attention and MLP.
    its_own = family == "gemma2" and mode == "mean"
    assert its_own != (f"{name}{'_mean' * (mode == 'mean')}: 1 × rmfast" in said), said


@old
def test_a_text_that_ends_with_padding_is_read_where_its_model_reads_it():
    w = wrapper()
    w.model.config.pad_token_id = M.EOS  # which its template ends with
    patcher = reward_lens.ActivationPatcher(w)
    for pair in PAIRS:
        without, within, said = both(lambda pair=pair: patcher.patch_all_components(*pair, show_progress=False))
        near(within.patch_effects, without.patch_effects, w.model)
        assert "patch_all_components: 1 × rmfast" in said


@old
def test_a_reward_made_in_another_way_is_its_own():
    w = wrapper()
    w.adapter.extract_reward = lambda output, inputs: 2 * output.logits[0, 0]
    patcher = reward_lens.ActivationPatcher(w)
    without, within, said = both(lambda: patcher.patch_all_components(*PAIRS[0], show_progress=False))
    np.testing.assert_array_equal(within.patch_effects, without.patch_effects)
    assert "its adapter makes the reward in another way" in said


@old
def test_a_reward_that_is_made_in_another_way_from_now_on():
    w = wrapper()
    patcher = reward_lens.ActivationPatcher(w)
    with integration.enable():
        patcher.patch_all_components(*PAIRS[0], show_progress=False)
    w.adapter.extract_reward = lambda output, inputs: 2 * output.logits[0, 0]
    without, within, said = both(lambda: patcher.patch_all_components(*PAIRS[0], show_progress=False))
    np.testing.assert_array_equal(within.patch_effects, without.patch_effects)
    assert "its adapter makes the reward in another way" in said


@old
@pytest.mark.parametrize("corpus", [lambda: iter(TEXTS), list], ids=["iterator", "empty"])
def test_a_corpus_that_can_not_be_counted_is_its_own(corpus):
    w = wrapper()
    patcher = reward_lens.ActivationPatcher(w)
    without, within, said = both(lambda: patcher.patch_all_components_mean(*PAIRS[0], corpus(), show_progress=False))
    near(within.patch_effects, without.patch_effects, w.model)  # its runs of the corpus are ours
    assert "a corpus that is no list of pairs" in said


# On and off -----------------------------------------------------------------------------------------------------------


def attributes():
    module = sys.modules["reward_lens.measure.battery.patch"]
    owners = [HFRuntime, PatchGrid, RewardModel]
    if reward_lens.__version__.startswith("2."):
        owners.append(reward_lens.ActivationPatcher)
    found = {(owner, name): value for owner in owners for name, value in vars(owner).items()}
    return found | {(module, name): value for name, value in vars(module).items()}


def test_nothing_stays_replaced_also_after_an_error():
    before = attributes()
    with pytest.raises(KeyError), integration.enable():
        assert attributes() != before
        signal().score(TEXTS, "no such readout")
    after = attributes()
    assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)


def test_nested_enables_are_counted():
    before = attributes()
    integration.enable()
    with integration.enable():
        pass
    assert attributes() != before
    integration.disable()
    assert attributes() == before
    integration.disable()
    assert integration.explain().startswith("reward-lens on rmfast: off")
    assert attributes() == before


def test_a_model_is_bound_once_and_goes_with_its_runtime(monkeypatch):
    times = []
    original = bound.bind_model
    monkeypatch.setattr(bound, "bind_model", lambda model: times.append(1) or original(model))
    s = signal()
    again = wrap_hf_model(s.runtime.model, tokenizer(), conformance_quickcheck=False)
    with integration.enable():
        for each in (s, s, again):
            each.score(TEXTS)
    assert len(times) == 1
    model = weakref.ref(s.runtime.model)
    del s, again, each
    gc.collect()
    assert model() is None


def test_a_version_that_is_not_known(monkeypatch):
    monkeypatch.setattr(reward_lens, "__version__", "3.2.0")
    with (
        pytest.warns(UserWarning, match=r"3\.2\.0 is not among the versions 2\.0\.1 and 3\.1\.0"),
        integration.enable(),
    ):
        pass
    monkeypatch.delattr(PatchGrid, "measure")
    with pytest.raises(ImportError, match=r"has no PatchGrid\.measure: rmfast knows versions 2\.0\.1 and 3\.1\.0"):
        integration.enable()
    assert integration.explain().startswith("reward-lens on rmfast: off")


def test_without_reward_lens(monkeypatch):
    monkeypatch.setitem(sys.modules, "reward_lens", None)
    with pytest.raises(ImportError, match="pip install"):
        integration.enable()
