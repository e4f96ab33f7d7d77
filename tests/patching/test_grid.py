"""PatchSweep: named axes, what is read off a grid, files, heat maps."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rmfast.patching.grid import PatchSweep, span

SIZES = {"site": 2, "layer": 3, "position": 4, "head": 2, "neuron": 2, "unit": 2, "label": 2}
COORDS = {
    "site": ["attn_out", "head_out"],
    "layer": [0, 2, 5],
    "position": [[0], [1], [2, 3, 5], [4]],
    "head": [1, 3],
    "neuron": [7, 70],
    "unit": [0, 1],
    "label": [0, 1],
}
WORDS = ["<s>", "This", " film", " cost", " $9", "\n"]


def sweep(*axes: str, **given: Any) -> PatchSweep:
    """A denoising sweep over these axes, the base reward 1 and the other 3; the first cell is NaN."""
    rewards = torch.randn([SIZES[axis] for axis in axes], generator=torch.Generator().manual_seed(0))
    if rewards.dim():
        rewards[(0,) * rewards.dim()] = torch.nan
    two = {"clean_reward": torch.tensor(3.0), "corrupted_reward": torch.tensor(1.0)}
    if "label" in axes:
        two = {"clean_reward": torch.tensor([3.0, -2.0]), "corrupted_reward": torch.tensor([1.0, 2.0])}
    made = {
        "rewards": rewards, "axes": axes, "coords": {axis: COORDS[axis] for axis in axes}, **two, "base": "corrupted",
        "mode": "denoising", "tokens": WORDS, "token_ids": list(range(6)), "unpaired": 1, "run": 9,
        "without_effect": 2, "engine": "suffix",
    }  # fmt: skip
    return PatchSweep(**{**made, **given})


def zero(*axes: str) -> PatchSweep:
    return sweep(*axes, corrupted_reward=None, base="clean", mode="zero")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))
    return a == b


# Reading


def test_effect_is_the_reward_less_that_of_the_base_run():
    grid = sweep("layer", "position")
    assert grid.base_reward.item() == 1
    assert same(grid.effect, grid.rewards - 1)


def test_recovered_is_the_share_of_the_gap_in_both_modes():
    grid = sweep("layer", "position")
    assert grid.other_reward.item() == 3
    assert same(grid.recovered, (grid.rewards - 1) / 2)
    noising = sweep("layer", "position", base="clean", mode="noising")
    assert noising.other_reward.item() == 1
    assert same(noising.recovered, (grid.rewards - 3) / -2)


def test_each_label_has_its_own_base_reward():
    grid = sweep("layer", "position", "label")
    assert same(grid.recovered[..., 1], (grid.rewards[..., 1] - 2) / -4)


def test_without_another_run_nothing_can_be_recovered():
    assert zero("layer").other_reward is None
    with pytest.raises(ValueError, match="mode 'zero'"):
        _ = zero("layer").recovered


def test_rewards_must_fit_their_coordinates():
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        sweep("layer", "position", rewards=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="in this order"):
        sweep("position", "layer")
    with pytest.raises(ValueError, match="more for head"):
        sweep("layer", coords={"layer": [0, 1, 2], "head": [0, 1]})


# Selecting


def test_select_by_a_value_removes_the_axis_and_by_a_list_keeps_it():
    grid = sweep("site", "layer", "position", "head")
    part = grid.select(site="head_out", layer=[5, 0])
    assert part.axes == ("layer", "position", "head")
    assert part.coords["layer"] == [5, 0]
    assert part.coords["site"] == ["head_out"]
    assert same(part.rewards, grid.rewards[1][[2, 0]])


@pytest.mark.parametrize(("wanted", "place"), [(1, 1), (3, 2), ("2-3,5", 2), (np.int64(4), 3)])
def test_a_position_names_the_entry_that_holds_it(wanted, place):
    grid = sweep("layer", "position")
    assert same(grid.select(position=wanted).rewards, grid.rewards[:, place])


def test_selecting_a_label_selects_its_rewards_too():
    grid = sweep("layer", "label")
    assert grid.select(label=1).base_reward.item() == 2
    assert same(grid.select(label=[1]).effect, grid.effect[:, 1:])


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ({"head": 1}, "Expected an axis of layer, position, got 'head'"),
        ({"layer": 1}, "Expected layer to be one of 0, 2, 5, got 1"),
        ({"position": 6}, "Expected position to be one of 0, 1, 2-3,5, 4, got 6"),
    ],
)
def test_what_is_not_in_the_grid_is_named(coords, message):
    with pytest.raises(ValueError, match=message):
        sweep("layer", "position").select(**coords)


# Ranking


def test_top_ranks_by_the_size_of_the_effect_without_nan():
    grid = sweep("site", "layer", "position", "head")
    rows = grid.top(1000)
    assert len(rows) == 47
    sizes = [abs(row.effect) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == grid.effect.nan_to_num().abs().max().item()


def test_a_row_holds_coordinates_tokens_and_values_that_select_takes_back():
    grid = sweep("site", "layer", "position", "head")
    row = grid.top(1)[0]
    assert row._fields == ("site", "layer", "position", "head", "token", "reward", "effect", "recovered")
    cell = grid.select(site=row.site, layer=row.layer, position=row.position, head=row.head)
    assert (cell.rewards.item(), cell.effect.item(), cell.recovered.item()) == row[-3:]
    assert {row.position: row.token for row in grid.top(1000)} == {
        0: "<s>", 1: "This", "2-3,5": " film cost\n", 4: " $9"
    }  # fmt: skip


def test_rows_of_a_part_still_tell_where_it_is():
    row = sweep("site", "layer", "position").select(site="attn_out", position=4).top(1)[0]
    assert (row.site, row.position, row.token) == ("attn_out", 4, " $9")


def test_rows_are_all_sites_in_grid_order():
    grid = sweep("layer", "position")
    assert [(row.layer, row.position) for row in grid.rows()[:5]] == [(0, 0), (0, 1), (0, "2-3,5"), (0, 4), (2, 0)]
    assert np.array_equal([row.reward for row in grid.rows()], grid.rewards.flatten().double(), equal_nan=True)


def test_top_by_rewards_and_by_recovered():
    grid = sweep("layer", "position", "label")
    assert abs(grid.top(1, by="rewards")[0].reward) == grid.rewards.nan_to_num().abs().max().item()
    assert abs(grid.top(1, by="recovered")[0].recovered) == grid.recovered.nan_to_num().abs().max().item()
    with pytest.raises(ValueError, match="'reward'"):
        grid.top(by="reward")
    assert zero("layer").top(1)[0].recovered is None
    with pytest.raises(ValueError, match="recovered"):
        zero("layer").top(by="recovered")


def test_a_dataframe_has_a_row_for_each_site():
    pytest.importorskip("pandas")
    grid = sweep("layer", "position", "head")
    frame = grid.to_dataframe()
    assert list(frame.columns) == list(grid.top(1)[0]._fields)
    table = frame.pivot(index="layer", columns=["position", "head"], values="effect").to_numpy()
    assert np.array_equal(table, grid.effect.flatten(1).double().numpy(), equal_nan=True)
    assert zero("layer").to_dataframe()["recovered"].isna().all()


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        sweep("layer").to_dataframe()


def test_repr_is_one_line_with_the_strongest_site():
    grid = sweep("layer", "position")
    row = grid.top(1)[0]
    assert repr(grid) == (
        f"PatchSweep(denoising, layer 3 × position 4, reward 1 -> 3, strongest layer {row.layer} position "
        f"{row.position} {row.token!r} {row.effect:+.4g})"
    )
    assert "noising by attribution" in repr(sweep("layer", mode="noising", method="attribution"))
    assert "zero, one site, reward 3, strongest" in repr(zero())
    assert "reward [1, 2] -> [3, -2]" in repr(sweep("layer", "label"))
    assert "strongest" not in repr(sweep("layer", rewards=torch.full((3,), torch.nan)))


def test_a_group_of_positions_is_written_short():
    assert [span([5]), span([3, 4, 5, 7]), span([])] == [5, "3-5,7", ""]


# Files


@pytest.mark.parametrize(
    "grid",
    [
        sweep(
            "site", "layer", "position", "unit", "label", screen={"method": "atp", "top": 3, "spearman": 0.5, "n": 3}
        ),
        sweep("layer", "position").select(layer=2),
        sweep("layer", rewards=torch.randn(3, dtype=torch.float64)),
        zero("layer"),
    ],
)
def test_a_saved_sweep_comes_back_exactly(grid, tmp_path):
    grid.save(tmp_path / "a" / "b")
    again = PatchSweep.load(tmp_path / "a" / "b")
    for field in dataclasses.fields(PatchSweep):
        assert same(getattr(grid, field.name), getattr(again, field.name)), field.name


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a folder that PatchSweep\.save wrote, got .*nowhere"):
        PatchSweep.load(tmp_path / "nowhere")
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(ValueError, match="something else"):
        PatchSweep.load(tmp_path)
    (tmp_path / "sweep.json").write_text("[")
    with pytest.raises(ValueError, match="Expected a folder"):
        PatchSweep.load(tmp_path)


def test_another_version_and_torn_files_are_refused(tmp_path):
    sweep("layer").save(tmp_path)
    described = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps({**described, "version": 2}))
    with pytest.raises(ValueError, match="its version is 2"):
        PatchSweep.load(tmp_path)
    sweep("layer").save(tmp_path)
    (tmp_path / "sweep.safetensors").write_bytes((tmp_path / "sweep.safetensors").read_bytes()[:40])
    with pytest.raises(ValueError, match="Expected a folder"):
        PatchSweep.load(tmp_path)


# Heat maps


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def drawn(axis: Any) -> np.ndarray:
    return np.ma.filled(axis.images[0].get_array().astype(float), np.nan)


def names(axis: Any, which: str = "x") -> list[str]:
    return [label.get_text() for label in getattr(axis, f"get_{which}ticklabels")()]


def test_plot_maps_layers_by_positions_with_their_tokens(pyplot):
    grid = sweep("layer", "position")
    axis = grid.plot()
    assert np.array_equal(drawn(axis), grid.effect.numpy(), equal_nan=True)
    assert names(axis) == ["0 '<s>'", "1 'This'", r"2-3,5 ' film cost\n'", "4 ' $9'"]
    assert names(axis, "y") == ["0", "2", "5"]
    low, high = axis.images[0].get_clim()
    assert -low == high == grid.effect.nan_to_num().abs().max()
    axis.figure.canvas.draw()


def test_rewards_are_coloured_around_the_base_reward(pyplot):
    low, high = sweep("layer", "position").plot("rewards").images[0].get_clim()
    assert (low + high) / 2 == pytest.approx(1)


def test_several_sites_are_several_maps_of_one_scale(pyplot):
    grid = sweep("site", "layer", "position")
    axes = grid.plot("recovered")
    assert axes.shape == (2,)
    assert np.array_equal(drawn(axes[1]), grid.recovered[1].numpy(), equal_nan=True)
    assert axes[0].images[0].get_clim() == axes[1].images[0].get_clim()
    assert "attn_out" in axes[0].get_title()


def test_a_cell_shows_its_strongest_head(pyplot):
    grid = sweep("layer", "position", "head")
    axis = grid.plot()
    values = grid.effect.numpy()
    strongest = np.where(abs(values[..., :1]) >= abs(values[..., 1:]), values[..., :1], values[..., 1:])[..., 0]
    strongest[0, 0] = values[0, 0, 1]  # the other is NaN
    assert np.array_equal(drawn(axis), strongest)
    assert "strongest head" in axis.get_title()


def test_positions_patched_jointly_are_left_out_of_the_map(pyplot):
    def joint(*axes: str) -> dict[str, Any]:
        coords = {axis: COORDS[axis] for axis in axes} | {"position": [[0, 1, 2, 3, 4, 5]]}
        return {"coords": coords, "rewards": torch.randn([len(coords[axis]) for axis in axes])}

    axes = ("layer", "position", "head")
    heads = sweep(*axes, **joint(*axes))
    axis = heads.plot()
    assert np.array_equal(drawn(axis), heads.effect[:, 0].numpy())
    assert names(axis) == ["1", "3"]
    axes = ("site", "layer", "position")
    sites = sweep(*axes, **joint(*axes))
    axis = sites.plot()
    assert np.array_equal(drawn(axis), sites.effect[..., 0].T.numpy())
    assert names(axis) == ["attn_out", "head_out"]
    assert "position 0-5" in axis.get_title()


def test_a_kind_of_one_unit_is_one_column_beside_heads(pyplot):
    grid = sweep("site", "layer", "unit")
    attention, heads = grid.plot()
    assert np.array_equal(drawn(attention), grid.effect[0, :, :1].numpy(), equal_nan=True)
    assert np.array_equal(drawn(heads), grid.effect[1].numpy())


def test_labels_are_maps_of_their_own_scale(pyplot):
    grid = sweep("layer", "position", "label")
    axes = grid.plot("rewards")
    assert [sum(axis.images[0].get_clim()) / 2 for axis in axes] == pytest.approx([1, 2])
    assert np.array_equal(drawn(axes[1]), grid.rewards[..., 1].numpy())
    assert np.array_equal(drawn(grid.plot()[1]), grid.effect[..., 1].numpy())


def test_labels_of_long_texts_are_thinned_out(pyplot):
    long = {"coords": {"layer": [0, 2, 5], "position": [[t] for t in range(500)]}, "tokens": [" $x$"] * 500}
    axis = sweep("layer", "position", rewards=torch.randn(3, 500), **long).plot()
    assert 50 <= len(names(axis)) <= 64
    assert names(axis)[1] == "8 ' $x$'"
    axis.figure.canvas.draw()


def test_plot_draws_where_it_is_told_with_options_of_imshow(pyplot):
    _, axis = pyplot.subplots()
    assert sweep("layer", "position").plot(ax=axis, cmap="PiYG", vmax=9) is axis
    assert axis.images[0].get_cmap().name == "PiYG"
    assert axis.images[0].get_clim()[1] == 9
    with pytest.raises(ValueError, match="2 Axes, one for each map, got 1"):
        sweep("site", "layer", "position").plot(ax=axis)


@pytest.mark.parametrize("grid", [zero(), zero("layer"), sweep("layer", rewards=torch.full((3,), torch.nan))])
def test_the_smallest_grids_are_drawn(pyplot, grid):
    grid.plot().figure.canvas.draw()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        sweep("layer").plot()
