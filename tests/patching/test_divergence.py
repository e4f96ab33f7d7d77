"""How far patched activations are from a reference: against NumPy on oracle activations, and on planted ones."""

from __future__ import annotations

import itertools
import re

import models as M
import numpy as np
import oracle
import pytest
import torch

import rmfast
from rmfast.patching.divergence import SORTS, Gaussian, Place, _of_largest, fit

FAMILIES = ["llama", "gemma2", "qwen3", "gpt2"]
RNG = np.random.default_rng(0)


def normal(n, width, units=2, seed=0):
    """Rows (n, U, W) of unequal variances, in turned directions."""
    draw = torch.Generator().manual_seed(seed)
    turn = torch.randn(units, width, width, generator=draw, dtype=torch.float64)
    x = torch.randn(n, units, width, generator=draw, dtype=torch.float64) * torch.linspace(0.2, 3, width)
    return torch.einsum("nuw,uwv->nuv", x, turn) + 5


def shrunk(x):
    """Ledoit and Wolf's covariance of (n, W), written out."""
    z = x - x.mean(0)
    n, width = z.shape
    s = z.T @ z / n
    mu = np.trace(s) / width
    delta = ((s - mu * np.eye(width)) ** 2).sum() / width
    beta = sum(((np.outer(row, row) - s) ** 2).sum() for row in z) / n**2 / width
    shrinkage = min(beta, delta) / delta if delta > 1e-12 * mu**2 else 0.0
    return (1 - shrinkage) * s + shrinkage * mu * np.eye(width)


@pytest.mark.parametrize("n, width", [(200, 12), (25, 60), (40, 40), (30, 1)])
def test_distances_are_those_of_the_shrunk_covariance(n, width):
    x, new = normal(n, width), normal(7, width, seed=0) + 1
    found = Gaussian.fit(x)
    for unit in range(2):
        rows, these = x[:, unit].numpy(), new[:, unit].numpy()
        z = these - rows.mean(0)
        want = np.sqrt(np.einsum("ni,ij,nj->n", z, np.linalg.inv(shrunk(rows)), z))
        np.testing.assert_allclose(found.distances(new)[:, unit], want, rtol=1e-9)


@pytest.mark.parametrize("n, width", [(200, 12), (25, 60)])
def test_the_covariance_is_scikit_learn_s(n, width):
    covariance = pytest.importorskip("sklearn.covariance")
    x = normal(n, width, 1)
    theirs = covariance.LedoitWolf().fit(x[:, 0].numpy())
    found = Gaussian.fit(x)
    assert float(found.shrinkage) == pytest.approx(theirs.shrinkage_)
    np.testing.assert_allclose(found.distances(x)[:, 0] ** 2, theirs.mahalanobis(x[:, 0].numpy()), rtol=1e-8)


def test_fewer_rows_than_values_and_huge_ones_are_well_conditioned():
    x = normal(40, 512, 1)
    x[..., 3] *= 1e6  # one massive direction
    found = Gaussian.fit(x)
    distances = found.distances(normal(20, 512, 1, seed=0) + torch.randn(20, 1, 512, dtype=torch.float64))
    assert distances.isfinite().all() and (found.rest > 0).all()
    assert torch.allclose(found.axes.mT @ found.axes, torch.eye(40, dtype=torch.float64), atol=1e-12)


def test_rows_that_are_all_the_same_tell_nothing():
    assert Gaussian.fit(torch.ones(9, 2, 4)).distances(torch.zeros(3, 2, 4)).isnan().all()
    almost = torch.ones(9, 1, 4) * (1 + 1e-7 * torch.randn(9, 1, 1, generator=torch.Generator().manual_seed(0)))
    assert Gaussian.fit(almost).distances(torch.zeros(3, 1, 4)).isnan().all()


def test_the_largest_of_some_tokens_is_each_as_often_as_it_says():
    for tokens, size in [(5, 1), (6, 3), (4, 4), (3, 9)]:
        drawn = list(itertools.combinations(range(tokens), min(size, tokens)))
        want = [sum(max(each) == i for each in drawn) / len(drawn) for i in range(tokens)]
        np.testing.assert_allclose(_of_largest(tokens, size), want, atol=1e-12)


# Planted: texts whose tokens share a part, so that they are not independent


def texts(count, width, tokens, rng):
    shared = rng.normal(size=(count, 1, width))
    return shared + rng.normal(size=(count, tokens, width)) * np.linspace(0.3, 2, width)


def place(rng, width=24, count=60, tokens=9, level=0.9, clusters=0.0):
    """Fitted on half of some texts, limited by the other half."""
    x = texts(count, width, tokens, rng) + clusters * rng.choice([-1, 1], (count, 1, 1))
    rows = torch.from_numpy(x[count // 2 :]).reshape(-1, 1, width)
    held = torch.from_numpy(x[: count // 2]).reshape(-1, 1, width)
    gaussian, held_out = Gaussian.fit(rows), count // 2
    weights = torch.full((held_out * tokens,), 1 / tokens / (held_out + 1), dtype=torch.float64)
    return Place.of(gaussian, gaussian.distances(held), weights, level, shell=width >= 8)


@pytest.mark.parametrize("width, level", [(24, 0.9), (200, 0.9), (1, 0.8)])
def test_natural_activations_are_flagged_as_often_as_the_level_says(width, level):
    rates = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        new = torch.from_numpy(texts(50, width, 9, rng)).reshape(-1, 1, width)
        rates.append(float((place(rng, width, level=level).scores(new).abs() > 1).double().mean()))
    error = np.std(rates) / 40**0.5
    # Of M held-out texts the limits leave at most 1 − level, and no more than 2 / (M + 1) less.
    assert 1 - level - 2 / 31 - 3 * error <= np.mean(rates) <= 1 - level + 3 * error


def test_what_no_text_makes_is_flagged_on_either_side():
    rng = np.random.default_rng(0)
    found = place(rng, clusters=4.0)
    middle = found.fitted.mean[None]
    assert found.scores(middle) < -1  # between the two clusters, where no text is
    assert found.scores(middle + 8 * torch.tensor([1, -1] * 12)) > 1
    natural = torch.from_numpy(texts(30, 24, 9, rng) + 4.0).reshape(-1, 1, 24)
    assert (found.scores(natural).abs() > 1).double().mean() < 0.2
    assert found.scores(natural.mean(0, keepdim=True)).abs() > 1  # mean ablation within a cluster


def test_of_a_few_values_the_mean_is_not_too_near():
    found = place(np.random.default_rng(0), width=2)
    assert -1 <= float(found.scores(found.fitted.mean[None])) < 0


def test_too_few_held_out_texts_tell_nothing():
    found = place(np.random.default_rng(0), count=20, level=0.9)
    assert found.scores(found.fitted.mean[None]).isnan()


# Models: an independent computation from activations of the unmodified model


def model(family, dtype=torch.float64):
    return M.decoder(family, num_hidden_layers=2).to(dtype)


def limits(held, level):
    """Median and limits of held-out distances, a list for each text; `one more text beyond any limit`."""
    values = sorted((d, 1 / len(each) / (len(held) + 1)) for each in held for d in each)
    total = sum(weight for _, weight in values)

    def least(values, share):
        running = 0.0
        for value, weight in values:
            running += weight
            if running >= share - 1e-9:
                return value
        return np.inf

    tail = (1 - level) / 2
    low = -least([(-value, weight) for value, weight in reversed(values)], 1 - tail)
    return least(values, total / 2), low, least(values, 1 - tail)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["resid_post", "attn_out", "head_out", "k"])
def test_divergence_is_what_numpy_makes_of_the_unmodified_model_s_activations(family, kind):
    m, seed, level = model(family), 3, 0.8
    reference_texts = M.token_ids([3 + i % 5 for i in range(20)], seed=1)
    (clean,) = M.token_ids([7], seed=9)
    corrupted = [(token + 17) % 256 for token in clean]
    with oracle.everything_in_fp64():
        rm = rmfast.RewardModel(m)
        reference = fit(rm, reference_texts, sites=kind, layers=[1], level=level, seed=seed)
        sweep = rm.patch_sweep(clean, corrupted, mode="noising", sites=kind, layers=[1], reference=reference)
        joint = rm.patch_sweep(
            clean, corrupted, mode="noising", sites=kind, layers=[1], positions="joint", reference=reference
        )
        new = oracle.activation(m, corrupted, kind, 1).numpy()
        every = [oracle.activation(m, ids, kind, 1).numpy() for ids in reference_texts]
    order = np.random.default_rng(seed).permutation(20)
    at = {"read": slice(-1, None), "first": slice(0, 1), "other": slice(1, -1)}
    grid = sweep.divergence.reshape(7, -1).numpy()
    for unit in range(new.shape[1]):
        scores, held_scores = np.full(7, np.nan), [[] for _ in range(10)]
        for sort in SORTS:
            rows = np.concatenate([every[i][at[sort], unit] for i in order[10:]])
            inverse, centre = np.linalg.inv(shrunk(rows)), rows.mean(0)

            def distance(x, inverse=inverse, centre=centre):
                return np.sqrt(np.einsum("ni,ij,nj->n", x - centre, inverse, x - centre))

            held = [distance(every[i][at[sort], unit]) for i in order[:10]]
            middle, low, high = limits(held, level)

            def score(d, middle=middle, low=low, high=high):
                return np.where(d > middle, (d - middle) / (high - middle), (d - middle) / (middle - low))

            scores[at[sort]] = score(distance(new[at[sort], unit]))
            for some, each in zip(held_scores, held):
                some.extend(score(each))
        reaches = ~np.isnan(grid[:, unit])
        assert reaches[-1] and (kind == "k" or not reaches[:-1].any())  # the last layer's output is read at one row
        np.testing.assert_allclose(grid[reaches, unit], scores[reaches], rtol=1e-6)
        # All seven at once: the largest of as many tokens of each held-out text, which have no more.
        largest = sorted(max(map(abs, each)) for each in held_scores)
        limit = largest[int(np.ceil(level * 11)) - 1]
        furthest = scores[abs(scores).argmax()]
        assert float(joint.divergence.reshape(-1)[unit]) == pytest.approx(furthest / limit, rel=1e-6)


@pytest.fixture(scope="module")
def rm():
    return rmfast.RewardModel(model("llama", torch.float32))


@pytest.fixture(scope="module")
def reference(rm):
    return fit(rm, M.token_ids([9] * 80, seed=1), sites=["attn_out", "mlp_out"], level=0.9)


@pytest.mark.parametrize("positions", ["all", "joint", [[2, 5], [3, 4, 6]]])
def test_activations_of_other_texts_are_flagged_as_often_as_the_level_says(rm, reference, positions):
    clean, corrupted = M.token_ids([9] * 40, seed=2), M.token_ids([9] * 40, seed=3)
    sweeps = rm.patch_sweep(
        clean, corrupted, mode="noising", sites=["attn_out", "mlp_out"], layers=[0], positions=positions,
        reference=reference,
    )  # fmt: skip
    rates = [float(sweep.divergent.double().mean()) for sweep in sweeps]
    assert not any(sweep.divergence.isnan().any() for sweep in sweeps)
    assert np.mean(rates) <= 0.1 + 3 * np.std(rates) / 40**0.5


@pytest.mark.parametrize("mode", ["mean", "zero"])
def test_ablations_are_flagged(rm, reference, mode):
    baseline = {"baseline": M.token_ids([9] * 20, seed=5)} if mode == "mean" else {}
    sweep = rm.patch_sweep(
        *M.token_ids([9], seed=4), mode=mode, sites=["attn_out", "mlp_out"], layers=[0], reference=reference, **baseline
    )
    inner = sweep.divergent[:, :, 1:-1]
    assert inner.double().mean() > 0.9
    if mode == "mean":
        assert (sweep.divergence[:, :, 1:-1] < 0).all()  # nearer to the mean than what the model makes


def test_a_sweep_s_divergence_is_selected_listed_and_kept(rm, reference, tmp_path):
    clean, corrupted = M.token_ids([9, 9], seed=6)
    sweep = rm.patch_sweep(clean, corrupted, sites=["attn_out", "mlp_out"], reference=reference)
    plain = rm.patch_sweep(clean, corrupted, sites=["attn_out", "mlp_out"])
    assert torch.equal(sweep.rewards, plain.rewards) and plain.divergence is None
    assert sweep.divergence.shape == sweep.rewards.shape and sweep.divergence.dtype == torch.float32
    assert sweep.reference == {"level": 0.9, "texts": 80, "held_out": 40}
    part = sweep.select(site="mlp_out", layer=[0])
    assert torch.equal(part.divergence, sweep.divergence[1, [0]])
    row = sweep.top(1, by="divergence")[0]
    assert row._fields[-1] == "divergence" and abs(row.divergence) == sweep.divergence.nan_to_num().abs().max()
    sweep.save(tmp_path)
    again = rmfast.PatchSweep.load(tmp_path)
    assert torch.equal(again.divergence.nan_to_num(9), sweep.divergence.nan_to_num(9))
    assert again.reference == sweep.reference
    with pytest.raises(ValueError, match="Expected a sweep with a reference for divergence"):
        _ = plain.divergent


def test_several_labels_share_a_cell_s_divergence():
    rm = rmfast.RewardModel(M.decoder("llama", labels=2))
    reference = fit(rm, M.token_ids([5] * 20, seed=1), layers=[0], level=0.8)
    sweep = rm.patch_sweep(*M.token_ids([5, 5], seed=2), layers=[0], reference=reference)
    assert sweep.divergence.shape == (1, 5) and sweep.divergent.shape == (1, 5, 2)
    assert torch.equal(sweep.select(label=1).divergence, sweep.divergence)
    assert sweep.select(label=[0]).divergent.shape == (1, 5, 1)


@pytest.mark.parametrize("family", ["bert", "phi3-longrope"])
def test_encoders_and_lengths_with_other_frequencies(family):
    m = M.encoder("Bert") if family == "bert" else M.decoder(family)
    rm = rmfast.RewardModel(m.double())
    lengths = [4 + i % 3 if family == "bert" else 20 + i % 9 for i in range(20)]
    ids = M.token_ids(lengths, seed=1)
    options = {"layers": [0], "level": 0.8}
    with oracle.everything_in_fp64():
        together = fit(rm, ids, **options)
        alone = fit(rm, ids, batch_tokens=1, **options)
        rest = np.random.default_rng(0).permutation(20)[10:]
        x = torch.cat([oracle.activation(m, ids[i], "resid_post", 0)[[0]] for i in rest])
    sort = "read" if family == "bert" else "first"
    for found in (together, alone):
        torch.testing.assert_close(found.places["resid_post", 0, sort].fitted.mean, x.mean(0), rtol=1e-8, atol=1e-10)


def test_a_plot_marks_divergent_cells(rm, reference):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweep = rm.patch_sweep(M.token_ids([9], seed=4)[0], mode="zero", sites="mlp_out", reference=reference)
    axis = sweep.plot()
    x, y = axis.lines[0].get_data()
    assert {(int(a), int(b)) for a, b in zip(y, x)} == set(map(tuple, sweep.divergent.nonzero().tolist()))
    drawn = sweep.plot("divergence")
    assert len(drawn.lines) == 0 or len(drawn.lines[0].get_data()[0]) == 0
    assert drawn.images[0].get_clim()[1] >= 1
    pyplot.close("all")


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda rm, ref: fit(rm, M.token_ids([5] * 77)), "at least 78 texts for level 0.95, got 77"),
        (lambda rm, ref: fit(rm, M.token_ids([5] * 20), level=1.0), "level to be a finite number in (0, 1)"),
        (lambda rm, ref: fit(rm, M.token_ids([5] * 20), sites="stream", level=0.8), "sites to be of resid_pre"),
        (lambda rm, ref: rm.patch_sweep([1, 2], [1, 3], reference=ref), "of all sites that are swept, got one without"),
        (
            lambda rm, ref: rmfast.RewardModel(model("qwen3")).patch_sweep([1, 2], [1, 3], reference=ref),
            "a reference of this very model",
        ),
    ],
)
def test_wrong_references_are_named(rm, reference, use, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        use(rm, reference)


def test_what_is_no_reference_is_a_type_error(rm):
    with pytest.raises(TypeError, match="reference to be a Reference"):
        rm.patch_sweep([1, 2], [1, 3], reference=[[1, 2]])
