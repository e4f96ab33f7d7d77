# %% [markdown]
# # From two texts to the heads that tell them apart
#
# Runs cell by cell in an editor that knows `# %%`, or as a script: `python examples/sweep.py --model M`. Without
# `--model` it takes the reward model that `make demo` trained and keeps in its cache.

# %%
import argparse
from pathlib import Path

import demo_data

import rmfast

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=demo_data.cache_dir() / "reward-model", help="a reward model's folder or hub id")
parser.add_argument("--clean", default="This film is wonderful, from the first scene to the last.")
parser.add_argument("--corrupted", default="This film is terrible, from the first scene to the last.")
parser.add_argument("--output", type=Path, default=Path("demo-out"), help="the folder for the maps")
args, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
args.output.mkdir(parents=True, exist_ok=True)
if args.model == parser.get_default("model") and not args.model.exists():
    raise SystemExit(f"Expected a reward model in {args.model}: run `make demo` first, or give --model")

rm = rmfast.load(args.model)


def keep(sweep: rmfast.PatchSweep, name: str) -> None:
    """Print a sweep and its five strongest sites, and save its map."""
    print(sweep)
    for row in sweep.top(5):
        where = ", ".join(f"{axis} {getattr(row, axis)}" for axis in sweep.axes)
        print(f"  {where}, {row.token!r}: {row.recovered:.1%} of the gap")
    sweep.plot("recovered").figure.savefig(args.output / f"{name}.png", dpi=150)


# %% [markdown]
# ## Where the difference is carried
#
# The base run is the corrupted text's. At each layer and token the residual stream is replaced by the clean run's: 1 in
# the map is the whole gap. It starts at the word that differs, and somewhere moves to the token that is read.

# %%
residual = rm.patch_sweep(args.clean, args.corrupted)
keep(residual, "sweep-residual")

# %% [markdown]
# ## What moves it
#
# What attention and MLP of each layer add to the stream, replaced at all tokens at once.

# %%
parts = rm.patch_sweep(args.clean, args.corrupted, sites=["attn_out", "mlp_out"], positions="joint")
keep(parts, "sweep-parts")

# %% [markdown]
# ## Which heads
#
# The three attention layers that bring back most, head by head; then each of their heads at each token, where a cell of
# the map shows the strongest head.

# %%
layers = sorted(row.layer for row in parts.select(site="attn_out").top(3))
heads = rm.patch_sweep(args.clean, args.corrupted, sites="head_out", layers=layers, positions="joint")
keep(heads, "sweep-heads")

# %%
tokens = rm.patch_sweep(args.clean, args.corrupted, sites="head_out", layers=layers)
keep(tokens, "sweep-head-tokens")
