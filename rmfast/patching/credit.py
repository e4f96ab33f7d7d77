"""Activation patching seen from every later token: what an edit does to the values that are read there.

A model trained to be temporally coherent (TCRM, arXiv 2604.22981) is a value function. Read at token k it gives r_k,
the reward that is expected at the end, and d_k = r_k − r_{k−1} is that token's credit. An edit changes values from its
first position on; where it takes hold, and which later tokens take back what it gave, is in the credits. With
r_{−1} = 0 they add up to the reward, and what an edit does to them to its effect:

    Σ_k (d'_k − d_k) = r'_K − r_K

All tokens of an edited run are read in the one run that a sweep makes of it: the last layer and the head run on all of
its rows in place of one.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from rmfast.arguments import instance, whole, word
from rmfast.engine.options import RunOptions, checked_run, takes
from rmfast.engine.scorer import Scorer
from rmfast.patching.divergence import Reference
from rmfast.patching.grid import PatchSweep
from rmfast.patching.pairs import Grid, Pair
from rmfast.patching.request import Request
from rmfast.patching.suffix_patcher import SuffixPatcher
from rmfast.patching.sweep import swept
from rmfast.plots import axes as axes_of
from rmfast.plots import figure_size, heat_map, needed, shown_figure

if TYPE_CHECKING:
    from typing_extensions import Unpack

Value = Literal["credit", "effect", "values"]


@dataclass(eq=False, repr=False, kw_only=True)
class CreditSweep:
    """What patching each site of a grid does to the reward read at every token.

    Attributes:
        sweep: the `PatchSweep` of the reward itself, K tokens on.
        values: the grid's dimensions and (T,), T the tokens of the base run up to the one of the reward, the last: what
            is read at each token of each edited run. CPU, fp32 (fp64 for an fp64 model); NaN where `sweep` is.
        base_values: (T,), of the base run.
        other_values: of the other run, at its own tokens; None where there was none.
    """

    sweep: PatchSweep
    values: Tensor
    base_values: Tensor
    other_values: Tensor | None = None

    def __repr__(self) -> str:
        return f"CreditSweep(values at {len(self.base_values)} tokens, {self.sweep!r})"

    def _repr_html_(self) -> str:
        """For notebooks: `plot` where it can be drawn as it is, else the sweep of the reward."""
        drawn = self.plot if len(self._rows) <= 1 else self.sweep.plot
        return shown_figure(drawn, repr(self))

    @property
    def effect(self) -> Tensor:
        """As `values`: those less the base run's."""
        return self.values - self.base_values

    @property
    def credits(self) -> Tensor:
        """As `values`: of the edited runs, each value less the one before it (at the first token, the value)."""
        return _steps(self.values)

    @property
    def base_credits(self) -> Tensor:
        """(T,): of the base run."""
        return _steps(self.base_values)

    @property
    def credit(self) -> Tensor:
        """As `values`: what each edit does to the credit of each token; over the tokens its effect on the reward."""
        return _steps(self.effect)

    @property
    def _rows(self) -> list[str]:
        """Axes of the grid that are longer than 1."""
        return [axis for axis, size in zip(self.sweep.axes, self.values.shape) if size > 1]

    def select(self, **coords: Any) -> CreditSweep:
        """The part of the grid at these coordinates, as `PatchSweep.select`; all tokens that are read stay."""
        places = torch.arange(self.sweep.rewards.numel(), dtype=torch.float64).reshape(self.sweep.rewards.shape)
        chosen = replace(self.sweep, rewards=places).select(**coords).rewards.long()
        return replace(self, sweep=self.sweep.select(**coords), values=self.values.flatten(0, -2)[chosen])

    def top(self, n: int = 10) -> list[Any]:
        """The n pairs of a site and a token whose credit it changes most, largest first; NaN is left out.

        Returns:
            Named tuples of the site's coordinates and token, as `PatchSweep.top`; then at, the token that is read,
            at_token, its text, value, effect and credit.
        """
        whole("n", n, 0)
        size = self.credit.double().abs().numpy().ravel()
        order = np.argsort(-size, kind="stable")
        columns = self._columns(order[~np.isnan(size[order])][:n])
        row = namedtuple("Credit", columns)  # type: ignore[misc]
        return list(map(row._make, zip(*columns.values())))

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each site and token that is read, with the columns of `top`.

        Raises:
            ImportError: pandas is not installed.
        """
        return needed("pandas", "to_dataframe").DataFrame(self._columns(np.arange(self.values.numel())))

    def _columns(self, flat: np.ndarray) -> dict[str, list]:
        """Of these places of the flattened values."""
        cell, at = np.divmod(flat, len(self.base_values))
        rows = self.sweep.rows()
        names = [name for name in rows[0]._fields if name not in ("reward", "effect", "recovered", "divergence")]
        columns: dict[str, list] = {name: [getattr(rows[i], name) for i in cell] for name in names}
        columns["at"], columns["at_token"] = at.tolist(), [self.sweep.tokens[t] for t in at]
        for name, of in (("value", self.values), ("effect", self.effect), ("credit", self.credit)):
            columns[name] = of.reshape(-1)[torch.from_numpy(flat)].tolist()
        return columns

    def plot(self, value: Value = "credit", ax: Any = None, **options: Any) -> Any:
        """Heat map of what is done at each token (columns), for each site along the one axis that is left (rows).

        Args:
            value: "credit" or "effect", coloured around 0, or "values" around the base reward.
            ax: the matplotlib Axes to draw on; default: a new figure.
            options: for `Axes.imshow`.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: more than one axis of the grid has several sites: `select` first.
        """
        word("value", value, ("credit", "effect", "values"))
        if len(self._rows) > 1:
            raise ValueError(f"Expected one axis of several sites to draw, got {', '.join(self._rows)}: select() first")
        name = self._rows[0] if self._rows else next(iter(self.sweep.axes), "site")
        entries = self.sweep.coords.get(name, [""])
        spans = [getattr(row, name) for row in self.sweep.rows()] if name == "position" else entries
        columns = [f"{t} {token!r}" for t, token in enumerate(self.sweep.tokens[: len(self.base_values)])]
        grid = getattr(self, value).double().numpy().reshape(len(entries), -1)
        centre = float(self.sweep.base_reward) if value == "values" else 0.0
        ax = axes_of(ax, *figure_size(*grid.shape))
        heat_map(ax, grid, list(map(str, spans)), columns, value, centre=centre, **options)
        ax.set_ylabel(f"patched {name}")
        ax.set_xlabel("token that is read")
        ax.set_title(f"{self.sweep.mode}: {value} at each token")
        return ax

    def save(self, folder: str | Path) -> None:
        """Write what `PatchSweep.save` writes, and `values.safetensors`; `load` gives all back."""
        self.sweep.save(folder)
        given = {"values": self.values, "base_values": self.base_values, "other_values": self.other_values}
        save_file({k: v.contiguous() for k, v in given.items() if v is not None}, Path(folder) / "values.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> CreditSweep:
        """The sweep that `save` wrote to a folder, exactly.

        Raises:
            ValueError: the folder holds none.
        """
        sweep = PatchSweep.load(folder)
        try:
            return cls(sweep=sweep, **load_file(Path(folder) / "values.safetensors"))
        except (OSError, TypeError, SafetensorError) as error:
            raise ValueError(f"Expected a folder that CreditSweep.save wrote, got {str(folder)!r}: {error}") from error


@takes(RunOptions)
def credit_sweep(
    rm: Scorer, clean: Any, corrupted: Any = None, *, mode: str | Tensor | Mapping[str, Tensor] = "denoising",
    sites: str | Sequence[str] = "resid_post", layers: int | Iterable[int] | None = None,
    positions: str | Iterable[Any] | None = None, heads: int | Iterable[int] | None = None,
    neurons: int | Iterable[int] | None = None, align: Any = "auto", baseline: Sequence[Any] | None = None,
    seed: int = 0, reference: Reference | None = None, **options: Unpack[RunOptions],
) -> Any:  # fmt: skip
    """`RewardModel.patch_sweep` with the reward read at every token of each edited run.

    Arguments and errors are those of `patch_sweep`. The prompt's tokens are read, too: what a model says there that was
    trained on responses alone is no value.

    Args:
        rm: a `RewardModel`, causal, with one label.
        options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`).

    Returns:
        A `CreditSweep`, or for lists one for each pair.

    Raises:
        ValueError: the model has several labels, or its head a gate; it is not run by the suffix engine (encoders,
            layers of unknown structure, hooks in the body).
    """
    given: dict[str, Any] = dict(options)
    progress = given.pop("progress", False)
    batch_tokens = checked_run(given.pop("batch_tokens", None), progress)
    request = _EveryToken(
        rm, mode=mode, sites=sites, layers=layers, positions=positions, heads=heads, neurons=neurons, align=align,
        baseline=baseline, seed=seed, **given,
    )  # fmt: skip
    rm.expect_invariance(getattr(request.patcher, "engine", None))
    if reference is not None:
        instance("reference", reference, Reference).expect(request)
    pairs, many = request.pairs(clean, corrupted)
    with tqdm(unit="site", disable=not progress) as bar:
        results = [swept(request, pair, batch_tokens, bar, reference=reference) for pair in pairs]
    return results if many else results[0]


class _EveryToken(Request):
    """A sweep whose rewards are (T,), read at every token, where a head of one label gives (1,)."""

    every = True

    def __init__(self, rm: Scorer, **asked: Any) -> None:
        super().__init__(rm, **asked)
        if rm.num_labels > 1 or rm.gated:
            raise ValueError("Expected a head of one label without a gate, whose rewards at a text's tokens are values")
        if not isinstance(self.patcher, SuffixPatcher):
            engine = rm.packed_engine()
            why = engine if isinstance(engine, str) else engine.why or f"{', '.join(self.kinds)} by hooks alone"
            raise ValueError(f"Expected a model and sites that the suffix engine runs, to read every token; here {why}")
        self.patcher = SuffixPatcher(self.patcher.engine, every=True)

    def result(  # type: ignore[override]
        self, pair: Pair, grid: Grid, flat: Tensor, base: Tensor, other: Tensor | None, **more: Any
    ) -> CreditSweep:
        last = None if other is None else other[-1:]
        return CreditSweep(
            sweep=super().result(pair, grid, flat[:, -1:], base[-1:], last, **more),
            values=flat.reshape(*grid.shape, -1),
            base_values=base,
            other_values=other,
        )


def _steps(values: Tensor) -> Tensor:
    return torch.diff(values, prepend=torch.zeros_like(values[..., :1]))
