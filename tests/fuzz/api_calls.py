"""What users can call, a right value for each argument, and which other values are right: what the fuzz tries."""

# Over 500 lines: one table of all that users call.
from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import models as M
import numpy as np
import torch
from safetensors.torch import save_file

import rmfast
from rmfast import concepts, debias, evaluation, interventions, last_token, losses, ops, probes, values
from rmfast.circuits.circuit import Circuit, circuit
from rmfast.circuits.edges import edge_attribution
from rmfast.circuits.faithfulness import faithfulness
from rmfast.circuits.nodes import RECEIVERS, SENDERS, Node
from rmfast.circuits.path_result import PathPatch
from rmfast.circuits.paths import path_patch
from rmfast.circuits.scores import EdgeScores
from rmfast.concepts.activations import SITES as SITES_OF_CONCEPTS
from rmfast.engine.scorer import Scorer
from rmfast.integrations.datasets import scorer
from rmfast.integrations.serve import remote_reward
from rmfast.interpret import cascade
from rmfast.interpret.comparison import mean_of_pairs
from rmfast.interpret.comparison_components import compare_components
from rmfast.interpret.conflict import term_conflict
from rmfast.interpret.learned_conflict import learned_conflict
from rmfast.interpret.pernicious import pernicious
from rmfast.interpret.sae_metrics import reward_recovered, sae_metrics
from rmfast.patching.activations import Activations, collect
from rmfast.patching.credit import credit_sweep
from rmfast.patching.divergence import Reference, fit
from rmfast.training.sae import TopKRecipe, train_sae

Right = Callable[[Any], bool]


@dataclass(frozen=True)
class Call:
    """A function with a right value for each argument, and for each what else is right."""

    name: str
    function: Callable[..., Any]
    given: dict[str, Any]
    right: dict[str, Right]


# What is right --------------------------------------------------------------------------------------------------------


def is_whole(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool) and math.isfinite(x)


def whole(least: float = -math.inf, most: float = math.inf) -> Right:
    return lambda x: is_whole(x) and least <= x <= most


def number(least: float = -math.inf, most: float = math.inf, open: bool = False) -> Right:
    return lambda x: is_number(x) and (least < x < most if open else least <= x <= most)


def one_of(*known: str) -> Right:
    return lambda x: isinstance(x, str) and x in known


def optional(right: Right) -> Right:
    return lambda x: x is None or right(x)


def either(*rights: Right) -> Right:
    return lambda x: any(right(x) for right in rights)


def all_of(right: Right, least: int = 0) -> Right:
    """A sequence of them."""

    def check(x: Any) -> bool:
        if isinstance(x, Iterator):
            x = list(x)
        if not isinstance(x, list | tuple | range | np.ndarray | torch.Tensor) or getattr(x, "is_meta", False):
            return False
        if getattr(x, "ndim", 1) == 0:
            return False
        plain = x.tolist() if getattr(x, "ndim", 0) == 1 else list(x)
        return len(plain) >= least and all(map(right, plain))

    return check


def instance(*kinds: type) -> Right:
    return lambda x: isinstance(x, kinds)


def flag(x: Any) -> bool:
    return isinstance(x, bool | np.bool_)


def text(x: Any) -> bool:
    """One input, as far as its type goes: what is in it is said with its index."""
    if isinstance(x, list | tuple | np.ndarray | torch.Tensor):
        return len(np.shape(x)) > 0 if isinstance(x, np.ndarray | torch.Tensor) else len(x) > 0
    return isinstance(x, str) and x != ""


def anything(x: Any) -> bool:
    """Where only errors are judged: a result for it is as good."""
    return True


texts = all_of(text)
indices = either(whole(), all_of(whole(), 1))
tensor, array = instance(torch.Tensor), instance(torch.Tensor, np.ndarray, list, tuple, range)
path = instance(str, Path)
SITE = one_of("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head_out", "mlp_neuron", "q", "k", "v")
COMPONENT = one_of("embedding", "attn_out", "mlp_out", "head_out", "mlp_neuron")
SITES, COMPONENTS = either(SITE, all_of(SITE, 1)), either(COMPONENT, all_of(COMPONENT, 1))


def positions_to_patch(x: Any) -> bool:
    if isinstance(x, Iterator):
        x = list(x)
    some = either(whole(), all_of(whole(), 1), instance(slice, range))
    return x is None or one_of("all", "joint")(x) or some(x) or (isinstance(x, list | tuple) and all(map(some, x)))


def alignment(x: Any) -> bool:
    if isinstance(x, Mapping):
        return all(is_whole(a) and (b is None or is_whole(b)) for a, b in x.items())
    return one_of("auto", "strict")(x) or all_of(optional(whole()))(x)


# What there is to call ------------------------------------------------------------------------------------------------

TEXTS = ["a text", "another text!"]
PAIRS = [("say", f"{'+' * i}!**\n\nyes {i}", f"say - {i}") for i in range(1, 11)]


@cache
def world() -> SimpleNamespace:
    """Models and results, made once; `folder` holds what they save."""
    keep = tempfile.TemporaryDirectory(prefix="rmfast-fuzz-")
    folder = Path(keep.name)
    mpl.use("Agg")
    rm = rmfast.RewardModel(M.decoder("llama"), M.tokenizer())
    pairs = [PAIRS[i % 10][1] + str(i) for i in range(20)]
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (48, 30), "b_enc": (30,), "W_dec": (30, 48), "b_dec": (48,)}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    sae = rmfast.SAE(architecture="topk", k=3, hook_name="blocks.1.hook_resid_post", **weights)
    read = [PAIRS[i] for i in range(10)]
    effects = [[float((i * j) % 7) + j for j in range(5)] for i in range(10)]
    (folder / "sae").mkdir()
    config = {"architecture": "topk", "k": 3, "d_in": 48, "d_sae": 30, "metadata": {"hook_name": sae.hook_name}}
    (folder / "sae" / "cfg.json").write_text(json.dumps(config))
    save_file(weights, folder / "sae" / "sae_weights.safetensors")
    rm.model.save_pretrained(folder / "model")
    rm.tokenizer.save_pretrained(folder / "model")
    sweep = rm.patch_sweep("a text", "b text")
    reference = fit(rm, TEXTS * 9, level=0.8)
    sweep.save(folder / "sweep")
    clamp = rmfast.NeuronClamp({"model.layers.0.mlp.up_proj": ([1, 2], [0.5, 0.25])})
    clamp.save(folder / "clamp")
    paths, edges = path_patch(rm, "a text", "b text"), edge_attribution(rm, "a text", "b text")
    paths.save(folder / "paths")
    edges.save(folder / "edges")
    chosen = circuit(edges, 20)
    chosen.save(folder / "circuit.json")
    concept = concepts.fit(rm, TWENTY_ONE, shuffles=5, resamples=5)
    concept.save(folder / "concept")
    collect(rm, TEXTS, folder / "rows", layer=1)
    probed = probes.run(rm, TWENTY_ONE, resamples=5)
    return SimpleNamespace(
        keep=keep,
        folder=folder,
        rm=rm,
        three=rmfast.RewardModel(M.decoder("llama", labels=3), M.tokenizer()),
        weights=weights,
        sae=sae,
        sweep=sweep,
        reference=reference,
        judged=rm.patch_sweep("a text", "b text", reference=reference),
        credits=credit_sweep(rm, "a text", "b text"),
        paths=paths,
        edges=edges,
        circuit=chosen,
        faithful=faithfulness(rm, chosen, "a text", "b text", resamples=5),
        joint=rm.patch_sweep("a text", "b text", sites=["attn_out", "mlp_out"], positions="joint"),
        attribution=rm.attribute("a text"),
        features=rm.sae_attribution("a text", sae),
        lens=rm.lens(pairs),
        everywhere=rm.lens(TEXTS, positions="all"),
        comparison=rmfast.compare(effects, effects),
        effects=effects,
        report=debias.report(rm, read),
        neurons=debias.localise(rm, read),
        runs=last_token.LastTokenRuns(rm, TEXTS),
        clamp=clamp,
        penalty=rmfast.LengthPenalty(0.01),
        curve=rmfast.LWR([1.0, 5.0], [0.5, 1.0]),
        values=rm.values_and_reward([("a", "b"), ("c", "de")]),
        concept=concept,
        probed=probed,
        probed_axes=sorted({effect.axis for effect in probed.effects}),
    )


ENCODING: dict[str, tuple[Any, Right]] = {
    "max_length": (40, optional(whole(1))),
    "truncation": ("error", one_of("error", "left", "right")),
    "format": (None, lambda x: x is None or callable(x) or one_of("chat", "pair", "concat")(x)),
}
OPTIONS = {**ENCODING, "batch_tokens": (64, optional(whole(1))), "progress": (False, flag)}
ENGINE = {"engine": (None, optional(one_of("packed", "padded")))}
NORMALIZE = {"normalize": (None, optional(all_of(either(number(), all_of(number(), 1)))))}
LAST_OR_ALL = {"positions": ("last", one_of("last", "all"))}
FROZEN_OR_RAW = {"norm": ("frozen", one_of("frozen", "raw"))}
NORM = ("rms", optional(one_of("rms", "layer", "gemma_rms")))
SEED = {"seed": (0, whole(0))}
CONFIDENCE = {"confidence": (0.9, number(0, 1, open=True))}
LAYERS = {"layers": (None, optional(indices)), "heads": (None, optional(indices)), "neurons": (None, optional(indices))}
SWEEP = {
    "clean": ("a text", text),
    "corrupted": ("b text", text),
    "mode": ("denoising", either(one_of("denoising", "noising"), instance(torch.Tensor, dict))),
    "sites": ("resid_post", SITES),
    **LAYERS,
    "positions": (None, positions_to_patch),
    "align": ("auto", alignment),
    "metric": (None, optional(callable)),
    **SEED,
}


def calls() -> Iterator[Call]:
    """All of them."""
    w = world()
    yield from _models(w)
    yield from _sweeps(w)
    yield from _circuits(w)
    yield from _readings(w)
    yield from _biases(w)
    yield from _benchmarks(w)
    yield from _training(w)
    yield from _kernels(w)
    yield from _server(w)
    yield from _concepts(w)
    yield from _autoencoders(w)


def call(name: str, function: Callable[..., Any], /, **arguments: tuple[Any, Right]) -> Call:
    given = {argument: value for argument, (value, _) in arguments.items()}
    return Call(name, function, given, {argument: right for argument, (_, right) in arguments.items()})


def _of_a_batch(**given: Any) -> Any:
    return scorer(**given)({"prompt": ["a", "b"], "response": ["c", "d"]})


def _under(backend: Any) -> None:
    with rmfast.backend(backend):
        pass


def _models(w: SimpleNamespace) -> Iterator[Call]:
    rm, inputs = w.rm, {"inputs": (TEXTS, texts)}
    yield call(
        "RewardModel", rmfast.RewardModel, model=(rm.model, instance(torch.nn.Module)),
        tokenizer=(rm.tokenizer, optional(lambda x: hasattr(x, "decode"))),
        pooling=("auto", either(one_of("auto", "last"), whole(0, 271))), head=(None, anything),
        compute=("auto", one_of("auto", "native", "fp32")),
    )  # fmt: skip
    yield call("TokenHead", partial(rmfast.TokenHead, 1, 2), difference=(None, optional(flag)))
    yield call(
        "load", rmfast.load, path_or_id=(w.folder / "model", path), dtype=(None, anything), device=(None, anything),
        trust_remote_code=(False, flag), pooling=("auto", either(one_of("auto", "last"), whole(0))),
        compute=("auto", one_of("auto", "native", "fp32")),
        head=(None, anything),
    )  # fmt: skip
    yield call("explain", rmfast.explain, op=(None, optional(instance(str))), device=(None, optional(instance(str))))
    yield call("backend", _under, backend=("eager", optional(one_of("eager", "cpp", "triton", "varlen", "cuda"))))
    yield call("encode", rm.encode, **inputs, errors=("raise", one_of("raise", "return")), **ENCODING)
    yield call(
        "score", rm.score, **inputs, positions=([0, -1], optional(all_of(whole()))), **NORMALIZE, **OPTIONS, **ENGINE,
        interventions=([w.clamp, None], optional(all_of(optional(instance(interventions.Intervention))))),
    )  # fmt: skip
    yield call(
        "score, of one intervention each", rm.score, inputs=(TEXTS, texts), interventions=([w.clamp, None], anything),
        intervention_index=([0, -1], optional(all_of(whole(-1, 1)))),
    )  # fmt: skip
    yield call("score of all", rm.score, **inputs, output=("all", one_of("rewards", "all")), **OPTIONS, **ENGINE)
    yield call("score of 3", w.three.score, **inputs, **NORMALIZE)
    yield call("token_values", rm.token_values, **inputs, **NORMALIZE, **OPTIONS, **ENGINE)
    # A device that is there starts a process: none of the values that are tried is one.
    yield call("score on devices", rm.score, **inputs, device=(None, lambda x: x is None))
    yield call(
        "datasets.scorer", _of_a_batch, rm=(rm, instance(Scorer)), columns=(None, optional(anything)),
        values=(False, flag), column=("r", optional(instance(str))), on_error=("raise", one_of("raise", "column")),
        max_length=OPTIONS["max_length"], truncation=OPTIONS["truncation"], batch_tokens=OPTIONS["batch_tokens"],
    )  # fmt: skip
    responses = {k: v for k, v in OPTIONS.items() if k != "truncation"}
    yield call(
        "step_scores", rm.step_scores, question=("1 + 1?", anything), steps=([["a", "b"], ["c"]], anything),
        reduce=("min", optional(one_of("min", "prod", "last", "mean"))), separator=(" ", optional(instance(str))),
        activation=(None, optional(one_of("sigmoid", "none"))), **responses, **ENGINE,
    )  # fmt: skip
    yield call(
        "values_and_reward", rm.values_and_reward, inputs=([("a", "b"), ("c", "de")], texts),
        gamma=(0.9, number(0, 1)), lam=(0.9, number(0, 1)), **responses, **ENGINE,
    )  # fmt: skip
    yield call(
        "values_and_reward of given rewards", rm.values_and_reward, inputs=([[5, 6, 7], [8, 9, 10]], anything),
        rewards=([[1.0], [1.0]], optional(all_of(all_of(number())))), response_start=([2, 2], all_of(whole(0, 2))),
    )  # fmt: skip
    yield call("Ensemble", rmfast.Ensemble, members=([rm, w.three], all_of(instance(rmfast.RewardModel), 1)),
               reduce=("min", one_of("mean", "min", "uwo", "soft_min")), beta=(1.0, number(0, open=True)),
               lam=(0.5, number(0)))  # fmt: skip
    yield call("strength", rmfast.strength, ensemble=(rmfast.Ensemble([rm, rm]), instance(rmfast.Ensemble)),
               pairs=(PAIRS, instance(list, tuple, np.ndarray, Iterator)), **OPTIONS, **ENGINE)  # fmt: skip
    yield call("heads.fit", partial(rmfast.heads.fit, rm), **inputs, targets=([0.5, 1.0], anything),
               loss=(None, anything), l2=(0.1, number(0, open=True)), **OPTIONS)  # fmt: skip
    yield call("split", w.values.split, flat=(w.values.values, tensor))
    yield call("with_interventions", rm.with_interventions)
    yield call(
        "a sum",
        lambda NeuronClamp: w.clamp + NeuronClamp,
        NeuronClamp=(w.penalty, instance(interventions.Intervention)),
    )
    yield call(
        "with an intervention", lambda interventions: rm.with_interventions(interventions),
        interventions=(w.clamp, instance(interventions.Intervention)),
    )  # fmt: skip


def _sweeps(w: SimpleNamespace) -> Iterator[Call]:
    rm = w.rm
    runs = {
        "screen": (None, optional(one_of("atp"))),
        "top": (None, optional(whole(1))),
        "checkpoint": (None, optional(path)),
        "reference": (w.reference, optional(instance(Reference))),
        **OPTIONS,
    }
    yield call("patch_sweep", rm.patch_sweep, **SWEEP, **runs)
    yield call("patch_sweep, screened", rm.patch_sweep, clean=("a text", text), corrupted=("b text", text),
               screen=("atp", one_of("atp")), top=(3, whole(1)))  # fmt: skip
    yield call("patch_sweep of heads", rm.patch_sweep, clean=("a text", text), corrupted=("b text", text),
               sites=("head_out", SITES), heads=([0, 1], optional(indices)), layers=(0, optional(indices)))  # fmt: skip
    yield call("patch_sweep of neurons", rm.patch_sweep, clean=("a text", text), corrupted=("b text", text),
               sites=("mlp_neuron", SITES), neurons=([0, 1], indices),
               positions=([0, [1, 2]], positions_to_patch))  # fmt: skip
    yield call("patch_sweep, aligned", rm.patch_sweep, clean=("a text", text), corrupted=("b text", text),
               align=({0: 0, 2: 2}, alignment))  # fmt: skip
    for mode in ("mean", "resample"):
        yield call(f"patch_sweep, {mode}", rm.patch_sweep, clean=("a text", text), mode=(mode, one_of(mode)),
                   baseline=(TEXTS, texts), **SEED)  # fmt: skip
    yield call("patch_sweep of values", rm.patch_sweep, clean=("a text", text),
               mode=({"resid_post": torch.zeros(48)}, instance(torch.Tensor, dict)))  # fmt: skip
    yield call("attribution_patch", rm.attribution_patch, **SWEEP, **ENCODING)
    yield call(
        "compare, a model", rm.compare, clean=(TEXTS * 5, texts), corrupted=(["b text", "a nother text"] * 5, texts),
        sites=(["attn_out", "mlp_out"], SITES), layers=(None, optional(indices)),
        mode=("noising", one_of("noising", "denoising")), **FROZEN_OR_RAW, align=("auto", alignment),
        label=(None, optional(whole(0, 0))), **CONFIDENCE, **SEED, **OPTIONS,
    )  # fmt: skip
    effects = all_of(array)
    yield call("compare", rmfast.compare, predicted=(w.effects, effects), measured=(w.effects, effects), **CONFIDENCE,
               **SEED)  # fmt: skip
    yield call("mean_of_pairs", mean_of_pairs, values=([float(i) for i in range(12)], array), **CONFIDENCE,
               **SEED)  # fmt: skip
    sweep, value = w.sweep, one_of("effect", "recovered", "rewards")
    yield call(
        "PatchSweep.select", sweep.select, layer=(0, either(whole(), all_of(whole()))), position=([0, 1], anything)
    )
    yield call("PatchSweep.top", sweep.top, n=(3, whole(0)), by=("effect", value))
    yield call("PatchSweep.plot", sweep.plot, value=("effect", value), ax=(None, optional(anything)))
    yield call("PatchSweep.save", sweep.save, folder=("saved", path))
    yield call("PatchSweep.load", rmfast.PatchSweep.load, folder=(w.folder / "sweep", path))
    yield call("Comparison.plot", w.comparison.plot, ax=(None, optional(anything)))
    alone = {name: each for name, each in SWEEP.items() if name != "metric"}
    yield call("credit_sweep", credit_sweep, rm=(rm, instance(Scorer)), **alone, **OPTIONS,
               reference=(w.reference, optional(instance(Reference))))  # fmt: skip
    yield call("CreditSweep.select", w.credits.select, layer=(0, either(whole(), all_of(whole()))))
    yield call("CreditSweep.top", w.credits.top, n=(3, whole(0)))
    yield call("CreditSweep.save", w.credits.save, folder=("credits", path))
    yield call("CreditSweep.plot", w.credits.select(layer=0).plot,
               value=("credit", one_of("credit", "effect", "values")), ax=(None, optional(anything)))  # fmt: skip
    yield call("fit, a reference", fit, rm=(rm, instance(Scorer)), texts=(TEXTS * 9, texts),
               sites=("resid_post", SITES), **LAYERS, level=(0.8, number(0, 1, open=True)),
               rows=(50, whole(2)), **SEED, **OPTIONS)  # fmt: skip
    sweeps = either(instance(rmfast.PatchSweep), all_of(instance(rmfast.PatchSweep), 1))
    yield call("pernicious", pernicious, sweeps=([w.judged], sweeps), share=(0.1, number(0)),
               gap=(1.0, optional(either(number(), all_of(number())))), **CONFIDENCE, **SEED)  # fmt: skip
    yield call("compare_components", compare_components, a=(w.effects, effects), b=(w.effects, effects),
               top=(2, whole(1)), persistence=(0.9, number(0, 1, open=True)),
               shuffle=("all", one_of("all", "layer", "site")), shuffles=(9, whole(1, 1_000_000)), **CONFIDENCE,
               **SEED)  # fmt: skip


def _circuits(w: SimpleNamespace) -> Iterator[Call]:
    rm, two = (w.rm, instance(Scorer)), {"clean": ("a text", text), "corrupted": ("b text", text)}
    lists = {"clean": (["a text", "so"], texts), "corrupted": (["b text", "no"], texts)}
    metric, ax = (None, optional(callable)), (None, optional(anything))

    def nodes(kinds: tuple[str, ...]) -> Right:
        def node(x: Any) -> bool:
            return (isinstance(x, Node) and x.kind in kinds) or one_of(*kinds)(x)

        return either(node, all_of(node, 1))

    def path_of(x: Any) -> bool:
        return isinstance(x, list | tuple) and len(x) == 2 and nodes(SENDERS)([x[0]]) and nodes(RECEIVERS)([x[1]])

    sent, read = ("head_out", nodes(SENDERS)), ([Node("q_input", 1), "reward"], nodes(RECEIVERS))
    yield call(
        "path_patch", path_patch, rm=rm, **two, senders=sent, receivers=read, positions=("joint", positions_to_patch),
        through=("residual", one_of("residual", "mlps")), mode=("noising", one_of("noising", "denoising")),
        align=("auto", alignment), metric=metric, **OPTIONS,
    )  # fmt: skip
    yield call("path_patch of edges", path_patch, rm=rm, **two,
               edges=([("embedding", Node("mlp_input", 1))], optional(all_of(path_of, 1))))  # fmt: skip
    value = ("effect", one_of("effect", "recovered", "rewards"))
    yield call("PathPatch.top", w.paths.top, n=(3, whole(0)), by=value)
    yield call("PathPatch.plot", w.paths.plot, value=value, ax=ax)
    yield call("PathPatch.save", w.paths.save, folder=("paths", path))
    yield call("PathPatch.load", PathPatch.load, folder=(w.folder / "paths", path))
    common, aligned = {"rm": rm, "metric": metric, **ENCODING}, {"align": ("auto", alignment)}
    yield call(
        "edge_attribution", edge_attribution, **two, **common, **aligned, steps=(2, optional(whole(1, 1_000_000))),
        rule=("left", one_of("midpoint", "left")), positions=("all", one_of("joint", "all")),
    )  # fmt: skip
    yield call("edge_attribution of lists", edge_attribution, rm=rm, **lists,
               weights=([1.0, -1.0], optional(array)))  # fmt: skip

    known = {edge[:2] for edge in w.edges.top(10**6)}

    def effects(x: Any) -> bool:
        return isinstance(x, Mapping) and all(edge in known for edge in x) and all(map(number(), x.values()))

    yield call("EdgeScores.top", w.edges.top, n=(3, whole(0)))
    yield call("EdgeScores.screen", w.edges.screen, n=(3, whole(0)))
    yield call("EdgeScores.agreement", w.edges.agreement, exact=({w.edges.top(1)[0][:2]: 1.0}, effects))
    yield call("EdgeScores.plot", w.edges.plot, ax=ax)
    yield call("EdgeScores.save", w.edges.save, folder=("edges", path))
    yield call("EdgeScores.load", EdgeScores.load, folder=(w.folder / "edges", path))
    yield call("circuit", circuit, scores=(w.edges, instance(EdgeScores)), n=(20, whole(0)),
               method=("greedy", one_of("top", "greedy")))  # fmt: skip
    yield call("Circuit.plot", w.circuit.plot, ax=ax)
    yield call("Circuit.save", w.circuit.save, path=("circuit.json", path))
    yield call("Circuit.load", Circuit.load, path=(w.folder / "circuit.json", path))
    drawn = {"resamples": (5, whole(1)), **CONFIDENCE, **SEED}
    circuits = (w.circuit, either(instance(Circuit), all_of(instance(Circuit), 1)))
    yield call("faithfulness", faithfulness, **common, **aligned, circuits=circuits, **two,
               ablation=("resample", one_of("resample")), prompts=(None, optional(all_of(anything))),
               **drawn)  # fmt: skip
    yield call("faithfulness of means", faithfulness, **common, circuits=circuits, clean=("a text", text),
               ablation=("mean", one_of("mean")), baseline=(TEXTS, texts), **drawn)  # fmt: skip
    yield call("Faithfulness.plot", w.faithful.plot, ax=ax)
    yield call("Faithfulness.save", w.faithful.save, path=("faithful.json", path))


def _readings(w: SimpleNamespace) -> Iterator[Call]:
    rm, inputs = w.rm, {"inputs": (TEXTS, either(text, texts))}
    yield call("attribute", rm.attribute, **inputs, components=(["embedding", "attn_out"], COMPONENTS), **LAST_OR_ALL,
               **FROZEN_OR_RAW, **OPTIONS)  # fmt: skip
    yield call(
        "sae_attribution", rm.sae_attribution, **inputs, sae=(w.sae, instance(rmfast.SAE)),
        layer=(1, optional(whole(0, 1))), site=("resid_post", optional(SITE)), **LAST_OR_ALL, **FROZEN_OR_RAW,
        top=(2, optional(whole(1))), **OPTIONS,
    )  # fmt: skip
    yield call("lens", rm.lens, inputs=(TEXTS, texts), **LAST_OR_ALL,
               norm=("final", one_of("final", "frozen", "raw")), **OPTIONS)  # fmt: skip
    ax, label = (None, optional(anything)), (0, whole(0, 0))
    yield call("Attribution.of", w.attribution.of, component=("attn_out", COMPONENT))
    yield call("Attribution.plot", w.attribution.plot, component=("attn_out", optional(COMPONENT)), label=label, ax=ax)
    yield call("Attribution.like", w.attribution.like, sweep=(w.joint, instance(rmfast.PatchSweep)))
    yield call("SAEAttribution.plot", w.features.plot, top=(3, whole(1)), label=label, ax=ax)
    yield call("Lens.tokens", w.lens.tokens, text=(0, whole(-20, 19)))
    yield call("Lens.crystallisation", w.lens.crystallisation, signed=(True, flag))
    yield call("Lens.compare", w.lens.compare, other=(w.lens, instance(rmfast.Lens)), **CONFIDENCE, **SEED)
    yield call("Lens.plot", w.lens.plot, pairs=(False, flag), text=(0, optional(whole(-20, 19))), label=label, ax=ax)
    yield call("Lens.plot, all", w.everywhere.plot, pairs=(False, flag), text=(0, optional(whole(-2, 1))), label=label)
    yield call(
        "SAE", rmfast.SAE, architecture=("topk", one_of("standard", "topk", "jumprelu")), k=(3, optional(whole(1, 30))),
        threshold=(None, optional(tensor)), apply_b_dec_to_input=(True, flag),
        normalize=("none", one_of("none", "layer_norm", "constant_norm_rescale")),
        hook_name=(None, optional(instance(str))), **{name: (x, tensor) for name, x in w.weights.items()},
    )  # fmt: skip
    yield call(
        "SAE.load", rmfast.SAE.load, folder=(w.folder / "sae", path), dtype=(None, anything), device=("cpu", anything)
    )
    yield call("SAE.encode", w.sae.encode, x=(torch.zeros(2, 48), tensor))


def _biases(w: SimpleNamespace) -> Iterator[Call]:
    rm, pairs = w.rm, {"pairs": (PAIRS, instance(list, tuple, Iterator))}
    named = one_of(*debias.ATTRIBUTES)

    def attribute(x: Any) -> bool:  # no pairs here have columns of their own
        functions = isinstance(x, Mapping) and all(isinstance(k, str) and callable(v) for k, v in x.items())
        return x is None or functions or named(x) or all_of(named, 1)(x)

    attributes = {"attributes": (["length", "exclamation"], attribute)}
    strings = all_of(optional(instance(str, list, tuple)))
    functions = (
        {"n": lambda prompt, response: 1.0},
        optional(lambda x: isinstance(x, Mapping) and all(isinstance(k, str) and callable(v) for k, v in x.items())),
    )
    yield call("debias.attributes", debias.attributes, prompts=(["p"], strings), responses=(["r"], strings),
               functions=functions)  # fmt: skip
    yield call(
        "debias.report", debias.report, rm=(rm, optional(instance(rmfast.RewardModel))), **pairs, **attributes,
        resamples=(20, whole(1)), **CONFIDENCE, **SEED,
        **OPTIONS,
    )  # fmt: skip
    yield call("debias.report of rewards", debias.report, rm=(None, optional(instance(rmfast.RewardModel))), **pairs,
               rewards=(np.arange(20.0).reshape(10, 2), array))  # fmt: skip
    yield call("debias.localise", debias.localise, rm=(rm, instance(rmfast.RewardModel)), **pairs, **attributes,
               **ENCODING)  # fmt: skip
    share = either(whole(0), lambda x: isinstance(x, float | np.floating) and 0 < x < 1)
    each = either(share, lambda x: isinstance(x, Mapping) and all(map(share, x.values())))
    rule = {"rule": ("accuracy", one_of("accuracy", "one_se"))}
    yield call("debias.fit", debias.fit, rm=(rm, instance(rmfast.RewardModel)), **pairs, **attributes,
               k=(2, either(each, one_of("search"))), trials=(2, whole(1)), choices=([1, 2], all_of(share)),
               folds=(1, whole(1)), **rule, **LAST_OR_ALL, **SEED, **OPTIONS)  # fmt: skip
    yield call("debias.fit, a search", debias.fit, rm=(rm, instance(rmfast.RewardModel)),
               pairs=(PAIRS[:8], instance(list, tuple, Iterator)), k=("search", either(each, one_of("search"))),
               trials=(1, whole(1, 100)), choices=([1, 2], all_of(share, 1)), **SEED)  # fmt: skip
    many = PAIRS * 2, instance(list, tuple, Iterator)
    yield call("debias.validate", debias.validate, rm=(rm, instance(rmfast.RewardModel)), pairs=many,
               test=(PAIRS[:2], optional(many[1])), k=(2, either(each, one_of("search"))), trials=(2, whole(1)),
               choices=([1], all_of(share)), folds=(2, whole(2)), controls=(1, whole(0, 1000)), **attributes, **rule,
               **CONFIDENCE, **SEED)  # fmt: skip
    yield call("debias.plot", debias.plot, reports=({"a": w.report}, instance(dict)))
    yield call("Neurons.top", w.neurons.top, attribute=("length", named), n=(3, whole(0)))
    yield call("Neurons.ends", w.neurons.ends, attribute=("length", named), k=(3, whole(0)))
    yield call("Neurons.clamp", w.neurons.clamp, k=(2, each), **LAST_OR_ALL)
    yield call("Neurons.random", w.neurons.random, like=(w.clamp, instance(rmfast.NeuronClamp)), **SEED)
    yield call("LastTokenRuns", last_token.LastTokenRuns, rm=(rm, instance(rmfast.RewardModel)), inputs=(TEXTS, texts),
               **OPTIONS)  # fmt: skip
    yield call("LastTokenRuns.projections", lambda names: list(w.runs.projections(names)),
               names=([*w.runs.widths][:2], optional(all_of(one_of(*w.runs.widths)))))  # fmt: skip
    yield call(
        "LastTokenRuns.rewards", w.runs.rewards, intervention=(w.clamp, optional(instance(interventions.Intervention)))
    )
    yield call("projections", interventions.projections, rm=(rm, instance(rmfast.RewardModel)))
    fingerprint = {"fingerprint": (None, optional(instance(str)))}
    yield call("NeuronClamp", rmfast.NeuronClamp, neurons=({"a": ([1, 2], [0.5, 1.0])}, instance(dict)), **LAST_OR_ALL,
               **fingerprint, metadata=({}, instance(dict)))  # fmt: skip
    yield call("DirectionRemoval", rmfast.DirectionRemoval, directions=(torch.eye(48)[:2], array),
               strength=(1.0, number()), norm=("before", one_of("before", "after")), **fingerprint)  # fmt: skip
    yield call(
        "mean_difference", rmfast.DirectionRemoval.mean_difference, rm=(rm, instance(rmfast.RewardModel)),
        with_=(TEXTS, texts), without=(["b"], texts), strength=(1.0, number()),
        norm=("before", one_of("before", "after")), **ENCODING,
    )  # fmt: skip
    yield call("LengthPenalty", rmfast.LengthPenalty, per_character=(0.1, number()), **fingerprint)
    yield call("LengthPenalty.expected", w.penalty.expected, characters=([1, 2], array))
    yield call("LWR", rmfast.LWR, characters=([1.0, 2.0], array), rewards=([1.0, 2.0], array), **fingerprint)
    yield call("LWR.fit", rmfast.LWR.fit, characters=([1.0, 2.0, 3.0], array), rewards=([1.0, 2.0, 1.5], array),
               frac=(1.0, number(0, 1)), **fingerprint)  # fmt: skip
    yield call("LWR.expected", w.curve.expected, characters=([1, 2], array))
    yield call("Intervention.save", w.clamp.save, path=("saved", path))
    yield call("interventions.load", interventions.load, path=(w.folder / "clamp", path))


TWENTY_ONE = [(f"ask {i}", f"yes {i * i}", f"no, not {i}") for i in range(21)]
ITEMS = [(f"ask {i}", {k: (f"no {k}, {i}", f"{k}! {i * i}") for k in ("deceit", "sabotage")}) for i in range(21)]


def _concepts(w: SimpleNamespace) -> Iterator[Call]:
    rm, draw = (w.rm, instance(rmfast.RewardModel)), np.random.default_rng(0)
    pairs = {"pairs": (TWENTY_ONE, instance(list, tuple, Iterator))}
    items = {"items": (ITEMS, instance(list, tuple, Iterator))}
    place = {"site": ("final", one_of(*SITES_OF_CONCEPTS)), "layer": (None, lambda x: x is None)}
    drawn = {"resamples": (5, whole(1)), **CONFIDENCE, **SEED}
    tested = {"permutations": (5, whole(1)), **drawn}
    labels = {"name": ("concept", instance(str)), "penalty": (0.01, number(0, open=True)), "folds": (3, whole(2, 21))}
    shrinkage = {"shrinkage": (0.1, either(number(0, 1), one_of("ledoit_wolf")))}
    yield call("concepts.activations", concepts.activations, rm=rm, inputs=(TEXTS, texts), **place, **OPTIONS)
    yield call("concepts.fit", concepts.fit, rm=rm, **pairs, **place, **labels,
               method=("mean_difference", one_of("mean_difference", "logistic")), shuffles=(5, whole(1, 1_000_000)),
               **drawn, **OPTIONS)  # fmt: skip
    yield call("concepts.leace", concepts.leace, x=(draw.normal(size=(9, 3)), array), z=([0, 1, 1] * 3, array),
               **shrinkage)  # fmt: skip
    if importlib.util.find_spec("sklearn") is not None:
        yield call("concepts.erase", concepts.erase, rm=rm, **pairs, **place, **labels, **shrinkage, **drawn, **OPTIONS)
    found = w.concept
    yield call("Concept.removal", found.removal, strength=(1.0, number()))
    yield call("Concept.save", found.save, path=("saved", path))
    yield call("Concept.load", concepts.Concept.load, path=(w.folder / "concept", path))
    eraser = concepts.leace(draw.normal(size=(9, 48)), [0, 1, 1] * 3, shrinkage=0.1)
    eraser = replace(eraser, site="final", fingerprint=w.rm.fingerprint)
    yield call("an eraser", eraser, x=(torch.zeros(2, 48), tensor))
    yield call("Erasure.save", eraser.save, path=("saved", path))
    yield call("concepts.erased", concepts.erased, rm=rm, erasure=(eraser, instance(concepts.Erasure)),
               inputs=(TEXTS, texts), **OPTIONS)  # fmt: skip
    yield call(
        "dose_response", concepts.dose_response, rm=rm, concept=(found, instance(concepts.Concept)),
        inputs=(TEXTS * 11, texts), doses=([-1.0, 0.0, 1.0], array), way=("add", one_of("add", "set")),
        random=(2, whole(1, 1_000_000)), prompts=([str(i) for i in range(22)], optional(all_of(anything))), **drawn,
        **OPTIONS,
    )  # fmt: skip
    numbers = {k: draw.normal(size=21).tolist() for k in ("deceit", "sabotage")}
    each = instance(list, tuple, dict, np.ndarray, torch.Tensor, range, Iterator)
    yield call(
        "cascade", cascade.cascade, differences=(numbers, instance(dict)),
        items=({k: list(range(21)) for k in numbers}, optional(instance(dict))),
        prompts=([str(i) for i in range(21)], optional(each)), hold=(draw.normal(size=21).tolist(), optional(each)),
        method=("pearson", one_of("pearson", "spearman")), **tested,
    )  # fmt: skip
    yield call("misalignment_cascade", cascade.misalignment_cascade, rm=rm, **items,
               method=("pearson", one_of("pearson", "spearman")), **tested, **OPTIONS)  # fmt: skip
    yield call("term_conflict", term_conflict, rm=(w.three, instance(rmfast.RewardModel)), **pairs,
               names=(["a", "b", "c"], optional(all_of(instance(str), 3))), weights=([1.0, 2.0, 0.5], optional(array)),
               **tested, **OPTIONS)  # fmt: skip
    yield call("learned_conflict", learned_conflict, rm=rm, **items, norm=("after", one_of("before", "after")),
               **tested, **OPTIONS)  # fmt: skip
    axes = (None, optional(either(one_of(*w.probed_axes), all_of(one_of(*w.probed_axes), 1))))
    yield call("probes.distortion", probes.distortion, found=(w.probed, instance(probes.Probed)), axes=axes)


def _autoencoders(w: SimpleNamespace) -> Iterator[Call]:
    rm, rows = (w.rm, instance(rmfast.RewardModel)), torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    yield call(
        "collect", collect, rm=rm, inputs=(TEXTS, texts), folder=(None, optional(path)), layer=(1, whole(0, 1)),
        site=("resid_post", SITE), positions=("all", one_of("all", "last")), skip=(0, whole(0)),
        dtype=(None, optional(one_of("float32", "bfloat16", "float16"))), **OPTIONS,
    )  # fmt: skip
    some = (rows, instance(torch.Tensor, Activations))
    yield call("Activations", Activations, rows=(rows, tensor), hook_name=(None, optional(instance(str))),
               positions=("all", optional(one_of("all", "last"))))  # fmt: skip
    yield call("Activations.open", Activations.open, folder=(w.folder / "rows", path))
    yield call("Activations.split", Activations(rows=rows).split, held_out=(3, whole(1, 39)))
    yield call("Activations.sample", Activations(rows=rows).sample, most=(3, whole(1)))
    yield call("Activations.batches", Activations(rows=rows).batches, size=(3, whole(1, 40)), start=(0, whole(0)),
               **SEED)  # fmt: skip
    positive, share = number(0, open=True), lambda x: is_number(x) and 0 <= x < 1
    yield call(
        "TopKRecipe", TopKRecipe, features=(30, whole(1)), k=(3, whole(1, 30)), steps=(4, whole(2)),
        batch=(8, whole(1)), lr=(1e-3, positive), warmup=(1, whole(0, 3)), decay=(1, whole(0, 3)),
        betas=((0.9, 0.99), all_of(share, 2)), clip=(1.0, positive), decoder=("unit", one_of("unit", "free")),
        aux=(0.1, number(0)), k_aux=(None, optional(whole(1))), dead_after=(9, whole(1)),
        b_dec=("mean", one_of("geometric_median", "mean", "zero")), apply_b_dec_to_input=(True, flag),
        normalize=("none", one_of("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")),
        product=("float32", one_of("float32", "bfloat16")), **SEED,
    )  # fmt: skip
    recipe = TopKRecipe(features=30, k=3, steps=2, batch=8)
    yield call(
        "train_sae", train_sae, activations=some, recipe=(recipe, instance(TopKRecipe)), folder=("sae", path),
        checkpoint_steps=(1, whole(1)), device=(None, anything), progress=(False, flag),
    )  # fmt: skip
    yield call("sae_metrics", sae_metrics, sae=(w.sae, instance(rmfast.SAE)), activations=some)
    yield call(
        "reward_recovered", reward_recovered, rm=rm, inputs=(TEXTS, texts), sae=(w.sae, instance(rmfast.SAE)),
        layer=(1, optional(whole(0, 1))), site=("resid_post", optional(SITE)), **LAST_OR_ALL, **OPTIONS,
    )  # fmt: skip


def _benchmarks(w: SimpleNamespace) -> Iterator[Call]:
    rm, rows = (w.rm, instance(rmfast.RewardModel)), [dict(zip(("prompt", "chosen", "rejected"), p)) for p in PAIRS]
    yield call("evaluate", evaluation.evaluate, rm=rm, data=(rows, instance(list, tuple, Iterator)), **OPTIONS,
               layout=(None, optional(one_of(*evaluation.LAYOUTS))),
               resamples=(20, whole(1)), **CONFIDENCE, **SEED)  # fmt: skip
    found = evaluation.evaluate(w.rm, rows, resamples=5)
    yield call("Evaluation.minus", found.minus, other=(found, instance(evaluation.Evaluation)))
    yield call("parity", evaluation.parity, rm=rm, inputs=(TEXTS, texts), scores=([1, 2], optional(array)), **ENCODING)


def _training(w: SimpleNamespace) -> Iterator[Call]:
    flat, ends = torch.randn(6), torch.tensor([0, 2, 6])
    weights = {"smooth": (0.1, number(0)), "lookahead": (0.01, number(0)), "reduction": ("sum", one_of("sum", "mean"))}
    start, margin = torch.tensor([0, 1]), (None, optional(tensor))
    yield call(
        "tcrm_loss", losses.tcrm_loss, values_chosen=(flat, tensor), values_rejected=(flat, tensor),
        cu_seqlens_chosen=(ends, tensor), cu_seqlens_rejected=(ends, tensor), **weights,
        response_start=((start, start), optional(instance(tuple, list))), margin=margin,
    )  # fmt: skip
    yield call(
        "linear_value_loss", losses.linear_value_loss, hidden=(torch.randn(6, 8), tensor),
        weight=(torch.randn(8), tensor), cu_seqlens=(ends, tensor), bias=(torch.zeros(1), optional(tensor)), norm=NORM,
        norm_weight=(torch.ones(8), optional(tensor)), norm_bias=(None, optional(tensor)),
        eps=(1e-6, number(0, open=True)), **weights,
        response_start=(start, optional(tensor)), margin=margin,
    )  # fmt: skip
    yield call(
        "losses.binned_mmd", losses.binned_mmd, x=(flat, tensor), bins=(torch.tensor([0, 0, 0, 1, 1, 1]), tensor),
        kernel=("rbf", one_of("rbf")), bandwidth=("median", lambda x: number(0, open=True)(x) or one_of("median")(x)
                                                  or all_of(number(0, open=True), 1)(x)),
        unbiased=(False, flag), groups=(torch.zeros(6, dtype=torch.int64), optional(tensor)),
        gather=(False, lambda x: x is False),
    )  # fmt: skip
    yield call("bin_factor", losses.bin_factor, z=(flat, tensor), n=(3, whole(1)))
    yield call("bradley_terry", losses.bradley_terry, chosen=(flat, tensor), rejected=(flat, tensor),
               margin=(0.5, optional(either(number(), tensor))), center=(0.1, optional(number(0))))  # fmt: skip
    yield call("correlation_penalty", losses.correlation_penalty, x=(flat, tensor), factor=(flat, tensor))
    yield call("gae", values.gae, values=(flat, tensor), rewards=(flat, tensor), cu_seqlens=(ends, tensor),
               gamma=(0.9, number(0, 1)), lam=(0.9, number(0, 1)))  # fmt: skip


def _server(w: SimpleNamespace) -> Iterator[Call]:
    def url(x: Any) -> bool:
        return isinstance(x, str) and x.startswith(("http://", "https://"))

    def token(x: Any) -> bool:
        return isinstance(x, str) and bool(x.strip())

    yield call(
        "remote_reward", remote_reward, url=("http://127.0.0.1:1", url), model=(None, optional(instance(str))),
        token=(None, optional(instance(str))), timeout=(1.0, number(0, open=True)), name=("reward", instance(str)),
        format=("concat", one_of("chat", "pair", "concat")),
    )  # fmt: skip
    if importlib.util.find_spec("fastapi") is None:
        return
    from rmfast.integrations.serve import Limits, create_app

    ones = {name: (9, whole(1)) for name in ("body", "texts", "tokens", "characters", "queue")}
    yield call(
        "Limits", Limits, max_wait=(0.005, number(0)), batch_tokens=(None, optional(whole(1))), **ones,
        timeout=(1.0, number(0, open=True)), body_seconds=(1.0, number(0, open=True)), drain=(1.0, number(0)),
    )  # fmt: skip
    yield call(
        "create_app", create_app, models=({"m": w.rm}, lambda x: isinstance(x, dict) and x.get("m") is w.rm),
        limits=(None, optional(instance(Limits))), token=(None, optional(token)),
    )  # fmt: skip


def _kernels(w: SimpleNamespace) -> Iterator[Call]:
    x, weight = torch.randn(4, 8), torch.randn(2, 8)
    index, some = torch.tensor([0, 1]), optional(tensor)
    eps, yes = (1e-6, number(0, open=True)), (False, flag)
    yield call(
        "reward_head", ops.reward_head, hidden=(x, tensor), weight=(weight, tensor), bias=(torch.zeros(2), some),
        norm=NORM, norm_weight=(torch.ones(8), some),
        norm_bias=(None, some), eps=eps, rows=(index, some), directions=(torch.randn(1, 8), some),
        strengths=(torch.ones(1, 1), some), targets=(None, some), intervention_index=(None, some),
    )  # fmt: skip
    yield call("ops.tcrm", ops.tcrm, chosen=(x[0], tensor), rejected=(x[0], tensor),
               bounds=(torch.tensor([[0], [8], [0], [8]]), tensor), margin=(None, some), smooth=(0.1, number(0)),
               lookahead=(0.1, number(0)), mean=yes)  # fmt: skip
    yield call("ops.binned_mmd", ops.binned_mmd, x=(x, tensor), bins=(torch.tensor([0, 0, 1, 1]), tensor),
               groups=(None, some), bandwidths=((1.0,), all_of(number(0, open=True))), unbiased=yes)  # fmt: skip
    yield call("neuron_stats", ops.neuron_stats, activations=(x, tensor), attributes=(x, tensor))
    yield call("patch_rows", ops.patch_rows, base=(x, tensor), values=(x, tensor), base_rows=(index, tensor),
               value_rows=(index, tensor), weight=(torch.ones(8), tensor), eps=eps, gemma=yes)  # fmt: skip
    heads = torch.randn(4, 2, 8)
    yield call(
        "suffix_attention", ops.suffix_attention, q=(heads, tensor), k=(heads, tensor), v=(heads, tensor),
        cu_seqlens=(torch.tensor([0, 2, 4], dtype=torch.int32), tensor), prefix_k=(None, some), prefix_v=(None, some),
        prefix_start=(None, some), prefix_len=(None, some), cu_queries=(None, some), scale=(1.0, optional(number())),
        causal=(True, flag), softcap=(None, optional(number(0, open=True))), window=(None, optional(whole(1))),
    )  # fmt: skip
    yield call("rms_norm", ops.rms_norm, x=(x, tensor), weight=(torch.ones(8), some), residual=(x, some),
               post_weight=(None, some), eps=eps, gemma=yes)  # fmt: skip
    yield call("rotary", ops.rotary, q=(heads, tensor), k=(heads, tensor), cos=(x, tensor), sin=(x, tensor),
               q_norm=(None, some), k_norm=(None, some), eps=eps, gemma=yes)  # fmt: skip
    yield call("gated_activation", ops.gated_activation, gate=(x, tensor), up=(x, tensor),
               kind=("silu", one_of("silu", "gelu", "gelu_tanh")))  # fmt: skip
    yield call("topk_encode", ops.topk_encode, x=(x, tensor), weight=(torch.randn(8, 12), tensor),
               bias=(torch.zeros(12), some), k=(3, whole(1, 12)), b_dec=(None, some), relu=(True, flag))  # fmt: skip
    yield call("linear", ops.linear, x=(x, tensor), weight=(torch.randn(5, 8), tensor), bias=(None, some),
               across=(False, flag))  # fmt: skip
