"""Writes docs/models.md: what runs how on which family, each cell tried on a tiny random model of transformers.

    python docs/site/make_models.py              all families, some minutes
    python docs/site/make_models.py opt gpt_oss  prints the rows of these alone

A family is added by a row in OTHERS, or in tests/models.py.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import models  # noqa: E402  tests/models.py

import rmfast  # noqa: E402
from rmfast.heads import Linear  # noqa: E402
from rmfast.interventions import projections  # noqa: E402
from rmfast.patching.sites import KINDS  # noqa: E402

SIZES = {
    "vocab_size": models.VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": models.BOS,
    "eos_token_id": models.EOS, "pad_token_id": models.PAD,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
# Of transformers' classes the prefix and what differs from SIZES; those that tests/models.py makes are its own.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 16}),
    "phi": ("Phi", {}),
    "opt": ("OPT", {"ffn_dim": 80, "word_embed_proj_dim": 48}),
    "falcon": ("Falcon", {"alibi": False}),
    "falcon, alibi": ("Falcon", {"alibi": True}),
    "falcon, new": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", {"d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "gpt_neox": ("GPTNeoX", {}),
    "gptj": ("GPTJ", {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "nemotron": ("Nemotron", {}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {"sliding_window": 16}),
    "starcoder2": ("Starcoder2", {}),
    "stablelm": (
        "StableLm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {}),
    "granite": ("Granite", {}),
    "deepseek_v2": ("DeepseekV2", _LATENT),
    "deepseek_v3": ("DeepseekV3", _LATENT),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2_moe": ("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 16}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}
ENCODERS = {"bert": "Bert", "roberta": "Roberta", "deberta_v2": "DebertaV2", "modernbert": "ModernBert"}
FAMILIES = [*dict.fromkeys([*models.DECODERS, "gpt2", *OTHERS]), *ENCODERS]
_CAUSAL = {"gpt2": "GPT2LMHeadModel", "gemma3": "Gemma3ForCausalLM"}  # named by another rule
COLUMNS = ("family", "engine", "scores", "lens", "attribution", "sweep", "sites", "token head", "clamps")
YES, NO = "yes", "-"


def _made(family: str, task: str) -> Any:
    """The model with a head of a task; ValueError where transformers has no such class."""
    if family in ENCODERS:
        more = {"pad_token_id": 1} if family == "roberta" else {}  # which has a row in its table of positions
        return models.encoder(ENCODERS[family], task=task, **more)
    if task == "CausalLM" and family in _CAUSAL:
        return models.randomised(getattr(transformers, _CAUSAL[family])(models.decoder(family).config))
    if family in (*models.DECODERS, "gpt2"):
        return models.decoder(family, task=task)
    prefix, more = OTHERS[family]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, "num_labels": 1, **more})
    name = f"{prefix}For{task}" if task else f"{prefix}Model"
    if not hasattr(transformers, name):
        raise ValueError(f"transformers has no {name}")
    torch.manual_seed(0)
    return models.randomised(getattr(transformers, name)(config))


def _reward_model(family: str) -> tuple[Any, Callable[[list[int]], Tensor]]:
    """A reward model of the family, and its rewards (1,) of one text by transformers alone."""
    try:
        model = _made(family, "SequenceClassification")
        return rmfast.RewardModel(model), lambda ids: models.alone(models.fresh(model), ids)
    except ValueError as reason:
        if "transformers has no" not in str(reason):
            raise
    body = _made(family, "")
    weight = torch.randn(1, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0)) / 7

    def plain(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return models.fresh(body)(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ weight.T

    return rmfast.RewardModel(body, head=Linear(weight=weight)), plain


class Tried:
    """One family's row, and what its cells do not say."""

    def __init__(self, family: str) -> None:
        self.cells, self.reasons = dict.fromkeys(COLUMNS, NO), list[str]()
        self.cells["family"] = family
        self.texts = models.token_ids([12, 20, 5])
        rm = self._try("engine", lambda: self._bound(family))
        if rm is None:
            return
        self._try("scores", lambda: self._scores(rm))
        self._try("lens", lambda: rm.lens(self.texts) and YES)
        self._try("attribution", lambda: rm.attribute(self.texts) and YES)
        self._try("sweep", lambda: self._sweep(rm))
        self._try("token head", lambda: self._token_head(family))
        self._try("clamps", lambda: self._clamps(rm))

    def _try(self, column: str, what: Callable[[], Any]) -> Any:
        try:
            found = what()
        except Exception as error:  # whatever it is, it is what a user would see
            self._say(column, f"{'' if isinstance(error, ValueError) else type(error).__name__ + ': '}{error}")
            return None
        if isinstance(found, str):
            self.cells[column] = found
        return found

    def _say(self, column: str, reason: str) -> None:
        reason = re.sub(r"\d\.\de[-+]\d+", "...", " ".join(reason.split()))  # no figure that goes by the machine
        self.reasons.append(f"{column}: {reason[:240]}{' ...' if len(reason) > 240 else ''}")

    def _bound(self, family: str) -> Any:
        rm, self.plain = _reward_model(family)
        engine = rm.packed_engine()
        self.cells["engine"] = "padded" if isinstance(engine, str) else "fused" if engine.layers else "modules"
        if isinstance(engine, str) or engine.why:
            self._say("engine", engine if isinstance(engine, str) else engine.why)
        return rm

    def _scores(self, rm: Any) -> str:
        want = torch.stack([self.plain(ids).reshape(()) for ids in self.texts])
        error = float((rm.score(self.texts) - want).abs().max() / want.abs().max().clamp(min=1))
        if not error <= 2e-5:
            raise ValueError(f"scores differ from transformers' by {error:.1e}")
        return YES

    def _sweep(self, rm: Any) -> str:
        clean = self.texts[1]
        corrupted = [*clean[:7], (clean[7] + 1) % 256, *clean[8:]]
        found = rm.patch_sweep(clean, corrupted, positions=[7])
        missing: dict[str, str] = {}
        for kind in KINDS:
            more = {"neurons": [0]} if kind == "mlp_neuron" else {}
            try:
                rm.patch_sweep(clean, corrupted, sites=kind, positions=[7], layers=[0], **more)
            except ValueError as error:
                missing[kind] = str(error).partition("; its parts")[0]
        self.cells["sites"] = f"{len(KINDS) - len(missing)} of {len(KINDS)}" if missing else "all"
        if missing:
            self._say("sites", f"not {', '.join(missing)}: {next(iter(missing.values()))}")
        return found.engine

    def _token_head(self, family: str) -> str:
        model = _made(family, "CausalLM" if family not in ENCODERS else "MaskedLM")
        got = rmfast.RewardModel(model, head=rmfast.TokenHead(5, 9)).score(self.texts)
        want = torch.stack([models.alone(models.fresh(model), ids)[-1, [5, 9]] for ids in self.texts])
        want = want[:, 0] - want[:, 1]
        if not (error := float((got - want).abs().max() / want.abs().max().clamp(min=1))) <= 2e-5:
            raise ValueError(f"scores differ from transformers' by {error:.1e}")
        return YES

    def _clamps(self, rm: Any) -> str:
        name = next(iter(projections(rm)))
        value = rmfast.NeuronClamp({name: ([0, 3], [0.5, -0.5])}, positions="all")
        got = rm.with_interventions(value).score(self.texts)

        def clamped(module: Any, args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[..., [0, 3]] = torch.tensor([0.5, -0.5])
            return out

        handle = rm.model.get_submodule(name).register_forward_hook(clamped)
        try:
            want = torch.stack([self.plain(ids).reshape(()) for ids in self.texts])
        finally:
            handle.remove()
        if not (error := float((got - want).abs().max() / want.abs().max().clamp(min=1))) <= 2e-5:
            raise ValueError(f"scores differ from those under plain hooks by {error:.1e}")
        return YES

    def row(self) -> str:
        return "| " + " | ".join(self.cells.values()) + " |"

    def notes(self) -> list[str]:
        return [f"- {self.cells['family']}: {reason}" for reason in self.reasons]


def tried(families: list[str]) -> list[Tried]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [Tried(family) for family in families]


def text(found: list[Tried]) -> str:
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    rows, notes = [each.row() for each in found], [note for each in found for note in each.notes()]
    return "\n".join([*head, *rows, "", "What the cells don't say:", "", *notes, ""])


INTRODUCTION = f"""# What runs how on which model

Made by `python docs/site/make_models.py` with transformers {transformers.__version__}: each cell was tried on a tiny
random model of the family, in fp32 on a CPU. Models are found by structure, not by name: others run as those do whose
layers they share, and `rm.explain()` says how one runs and why.

- engine: *fused* (packed, layers by structure), *modules* (packed, the model's own layers around our attention) or
  *padded*.
- scores: those of the model's own forward, each text alone, to 2e-5. Families without a `ForSequenceClassification`
  have a `rmfast.heads.Linear` on their body.
- lens, attribution: `rm.lens`, `rm.attribute`.
- sweep: the engine of `rm.patch_sweep`; sites: how many of its {len(KINDS)} kinds there are.
- token head: `rmfast.TokenHead` of two tokens, as the model's own logits say.
- clamps: `rmfast.NeuronClamp` at all positions, as plain hooks on the model have it.

Heads of other kinds ([heads.md](heads.md)) are programs over the same rows, and go wherever scores go.

"""


def main(families: list[str]) -> None:
    if families:
        print(text(tried(families)))
        return
    (ROOT / "docs" / "models.md").write_text(INTRODUCTION + text(tried(FAMILIES)))


if __name__ == "__main__":
    main(sys.argv[1:])
