"""Activations of a site: what hooks on the model see, kept in order, and batches of them in an order of their own."""

from __future__ import annotations

import itertools
import re

import models as M
import oracle as O
import pytest
import torch

import rmfast
from rmfast.patching.activations import Activations, collect
from rmfast.patching.sites import STREAM_KINDS

SHARED = M.token_ids([20])[0]
TEXTS = [SHARED + tail for tail in M.token_ids([5, 9, 1], seed=1)] + M.token_ids([30, 3], seed=2)


def seen(model, kind, layer, positions="all", skip=0):
    """By hooks, text by text."""
    each = [O.activation(model, ids, kind, layer)[:, 0] for ids in TEXTS]
    return torch.cat([x[-1:] if positions == "last" else x[skip:] for x in each]).detach()


def assert_rows(got, want):
    assert got.shape == want.shape
    torch.testing.assert_close(got.float(), want.float(), rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("kind", STREAM_KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_rows_are_those_that_hooks_see(family, kind, positions):
    model = M.decoder(family)
    for layer in (0, 1):
        found = collect(rmfast.RewardModel(model), TEXTS, layer=layer, site=kind, positions=positions)
        assert_rows(found.rows, seen(model, kind, layer, positions))
        assert (found.hook_name, found.positions) == (f"blocks.{layer}.hook_{kind}", positions)


def test_an_encoder_has_rows_too():
    model = M.encoder("ModernBert", task="TokenClassification")
    found = collect(rmfast.RewardModel(model), TEXTS, layer=0, site="attn_out")
    assert_rows(found.rows, seen(model, "attn_out", 0))


def test_the_first_tokens_may_be_left_out():
    model = M.decoder("llama")
    found = collect(rmfast.RewardModel(model), TEXTS, layer=1, skip=2)
    assert_rows(found.rows, seen(model, "resid_post", 1, skip=2))


@pytest.mark.parametrize("compute", ["native", "fp32"])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_a_folder_is_memory_mapped_and_holds_the_same_bits(dtype, compute, tmp_path, monkeypatch):
    monkeypatch.setattr("rmfast.patching.activations._WINDOW_TOKENS", 30)  # several windows
    rm = rmfast.RewardModel(M.decoder("llama").bfloat16(), compute=compute)
    kept = collect(rm, TEXTS, layer=1, dtype=dtype)
    collect(rm, TEXTS, tmp_path, layer=1, dtype=dtype)
    found = Activations.open(tmp_path)
    own = "bfloat16" if compute == "native" else "float32"
    assert found.rows.dtype == kept.rows.dtype == getattr(torch, dtype or own)
    assert torch.equal(found.rows, kept.rows)
    assert repr(found) == repr(kept)
    assert found.fingerprint == kept.fingerprint


def numbered(n, d=3):
    return Activations(rows=torch.arange(n, dtype=torch.float32)[:, None].expand(n, d))


@pytest.mark.parametrize("n, size, at_once", [(1000, 100, 1 << 29), (1000, 64, 1), (300, 300, 1), (2111, 50, 1)])
def test_an_epoch_s_batches_hold_different_rows_nearly_all_of_them(n, size, at_once, monkeypatch):
    monkeypatch.setattr("rmfast.patching.activations._SHUFFLED_BYTES", at_once)
    data = numbered(n)
    groups = -(-n // max(4 * size, 256))
    epoch = list(itertools.islice(data.batches(size), n // size - (groups - 1)))
    assert all(batch.shape == (size, 3) for batch in epoch)
    rows = torch.cat(epoch)[:, 0]
    assert len(rows.unique()) == len(rows) >= n - groups * size
    assert not torch.equal(rows, rows.sort().values)


def test_batches_go_by_the_seed_and_may_start_later(monkeypatch):
    monkeypatch.setattr("rmfast.patching.activations._SHUFFLED_BYTES", 1)
    data = numbered(1500)
    some = torch.cat(list(itertools.islice(data.batches(100, seed=3), 40)))  # of three epochs
    for start in (0, 7, 15, 31):
        later = torch.cat(list(itertools.islice(data.batches(100, seed=3, start=start), 40 - start)))
        assert torch.equal(some[100 * start :], later)
    other = torch.cat(list(itertools.islice(data.batches(100, seed=4), 40)))
    assert not torch.equal(some, other)


def test_held_out_rows_are_the_last_ones():
    train, held = numbered(10).split(3)
    assert (len(train), held.rows[:, 0].tolist()) == (7, [7, 8, 9])
    assert numbered(10).sample(4)[:, 0].tolist() == [0, 3, 6, 9]


def test_what_does_not_fit_is_named(tmp_path):
    rm = rmfast.RewardModel(M.decoder("llama"))
    for call, message in (
        (lambda: collect(rm, TEXTS, layer=2), "layer to be an int from 0 to 1, got 2"),
        (lambda: collect(rm, TEXTS, layer=0, site="q"), "site to be one of resid_pre"),
        (lambda: collect(rm, TEXTS, layer=0, skip=1, positions="last"), 'skip with positions "all" alone, got 1'),
        (lambda: collect(rm, [], layer=0), "at least one token to keep"),
        (lambda: collect(rm, [], tmp_path, layer=0), "at least one token to keep"),
        (lambda: collect(rmfast.RewardModel(M.encoder()), TEXTS, layer=0), "got one that pools"),
        (lambda: numbered(10).batches(11), "at most the 10 rows of activations, got 11"),
        (lambda: Activations(rows=torch.zeros(3)), "rows (N, d) of float32, bfloat16, float16, got (3,)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    with pytest.raises(FileNotFoundError, match=r"holds no activations: it has no activations\.json"):
        Activations.open(tmp_path)
    collect(rm, TEXTS, tmp_path, layer=0)
    with (tmp_path / "activations.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="to hold 108 rows of 48 in float32, got 20740 B"):
        Activations.open(tmp_path)
