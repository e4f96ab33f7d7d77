"""`RewardModel`: the face of the library, a scorer with one method for each workload; `load` makes one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from rmfast.arguments import word
from rmfast.engine.options import Encoding, RunOptions, ScoreOptions, check_options, takes
from rmfast.engine.scorer import Scorer
from rmfast.loading import load_checkpoint

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rmfast.debias.interventions import Intervention
    from rmfast.interpret.comparison import Comparison
    from rmfast.interpret.lens import Lens
    from rmfast.interpret.sae import SAE
    from rmfast.training.values import ResponseValues


class RewardModel(Scorer):
    """A transformers reward model, bound to the fused reward head.

    Args:
        model: a transformers model with a reward head, in memory: sequence or token classification, with a linear or
            MLP head, or an encoder that pools by itself; may carry peft adapters, be quantised, or be spread by
            device_map. Its weights are used where they are, and read at each call: what is changed in it later is
            seen or refused (docs/reward_model.md). While it is scored it is in eval mode, for all threads.
        tokenizer: its tokenizer; None where all inputs are token ids.
        pooling: the token at which `score` reads: "auto" (where the model's own code reads a text alone, for
            transformers' classes the rightmost id other than the configuration's pad_token_id), "last", or a token id
            (its rightmost occurrence, or its first where the model reads that).
        invariant: True for rewards that have the same bits in any batch (docs/reliability.md), and an error of any run
            that can't promise them; False for runs that don't pad their rows for it. None, the default, pads on CPUs,
            where it costs 1% of a batch, and promises what `explain` says.
        compute: "native" multiplies in the dtype that the weights are stored in; "fp32" in fp32, without a copy of
            16-bit weights, so that rewards are those of the same weights after `model.float()`. "auto", the default,
            takes what is faster on this CPU (`explain` says which and why); native on other devices.
        head: in place of the model's own: a head of `rmfast.heads`, a `rmfast.TokenHead`, or a function of the final
            normed hidden states (M, d) of the tokens that are read, which gives (M,) or (M, K)
            (`rmfast.heads.FunctionHead` for one of all tokens of a text). The model may then be a bare body or a
            language model (docs/heads.md).
        cuda_graphs: True for texts as CUDA graphs, or an error: for small models (docs/gpu.md). No GPU has tried it.

    Attributes:
        num_labels: K, the rewards of one token.
        max_length: most tokens of a text that the model and tokenizer are made for, or None.
        binding: the parts found in the model (`rmfast.binding.binding.Binding`).
        interventions: what `with_interventions` has put in, or None.

    What it has beside these and the methods below is `Scorer`'s, which workloads stand on, and may change.

    Raises:
        ValueError: no body and head are found in the model, or they do not reproduce its own logits on a few tokens; it
            reads a text by no known rule; all its logits overflow.
    """

    @takes(ScoreOptions)
    def score(  # type: ignore[override]
        self,
        inputs: Sequence[Any],
        *,
        positions: Sequence[int] | None = None,
        normalize: tuple[Any, Any] | Literal["own"] | None = None,
        interventions: Sequence[Intervention | None] | None = None,
        intervention_index: Sequence[int] | None = None,
        output: Literal["rewards", "all"] = "rewards",
        device: Any = None,
        **options: Unpack[ScoreOptions],
    ) -> Any:
        """One reward (or K) for each input: the head's raw output.

        Args:
            inputs: a sequence of (prompt, response) pairs, chat message lists, records ({"messages"}, {"prompt",
                "response"} or {"text"}; also "tools", "chat_template_kwargs"), strings, or token-id sequences (list,
                1-D array or tensor), in any mixture; or a tokenizer's result, whose padding is left out. With a chat
                template a pair is a user and an assistant turn (the prompt may also be a list of messages). Without
                one an encoder gets its tokenizer's pair encoding, a decoder prompt + response.
            normalize: (mean, std), numbers or K of each; the result is (reward − mean) / std. "own": those that the
                checkpoint brings (OpenRLHF).
            positions: the token at which each input is read, after truncation, negative from the end; in place of
                pooling.
            interventions: V of them (`rmfast.interventions`; None for none): the rewards under each, on top of the
                model's own. Those that clamp the same neurons, or none, share one pass of the body.
            intervention_index: the one of them that each input gets, −1 for none, in place of all.
            output: "all" for a dict of all that the head makes: "scores", which are what is returned else; "rewards"
                (N, A), the attributes or labels, with their "names"; and by the kind of head "gates" (N, G),
                "quantiles" (N, Q), "spreads", "bins", "logits" (docs/heads.md). Not with interventions or normalize.
            device: several devices, like ["cuda:0", "cuda:1"], on each of which a process of its own runs a part of the
                inputs with a copy of the model, for this call alone (docs/scale.md). Default: where the model is.
            options: max_length, truncation, format, chat_template_kwargs, tools, batch_tokens, progress, engine
                (`rmfast.engine.options`).

        Returns:
            (N,) for K = 1, else (N, K), in input order, on the CPU; fp32 (fp64 for an fp64 model). With interventions
            and no intervention_index (V, N) or (V, N, K).

        Raises:
            InputError: (a ValueError) an input is empty, of an unknown kind, over max_length, outside of the
                vocabulary, or lacks the pooling token. `.index` is its position.
            ValueError, TypeError: an argument is wrong.
            RuntimeError: a process on one of `device` ended or failed.
        """
        word("output", output, ("rewards", "all"))
        if output == "all":
            if any(each is not None for each in (normalize, interventions, intervention_index, device)):
                raise ValueError('Expected no normalize, interventions, intervention_index or device with output="all"')
            return super().outputs(inputs, positions=positions, **options)
        variants = None
        if interventions is None and intervention_index is not None:
            raise ValueError("Expected interventions with intervention_index, got None")
        if interventions is not None:
            from rmfast.debias.apply import variants_of

            variants = partial(variants_of, self, interventions, intervention_index)
        return super().score(
            inputs, positions=positions, normalize=normalize, variants=variants, device=device, **options
        )

    @takes(ScoreOptions)
    def token_values(  # type: ignore[override]
        self, inputs: Sequence[Any], *, normalize: tuple[Any, Any] | Literal["own"] | None = None, device: Any = None,
        **options: Unpack[ScoreOptions],
    ) -> list[Tensor]:  # fmt: skip
        """The reward read at every token of every input, from one pass of the body.

        Arguments and errors are those of `score`. Value t of an input is what `score` with position t gives.

        Returns:
            For each input (T_i,), or (T_i, K) for K > 1, on the CPU; fp32 (fp64 for an fp64 model). `encode` gives the
            tokens they belong to.

        Raises:
            ValueError: the model pools by itself (a cross-encoder), so tokens have no reward of their own.
        """
        return super().token_values(inputs, normalize=normalize, device=device, **options)

    @takes(ScoreOptions, "truncation")
    def step_scores(
        self, question: Any, steps: Any = None, *, reduce: Literal["min", "prod", "last", "mean"] | None = None,
        separator: str | None = None, answer: str | None = None, step_tag_id: int | None = None,
        returned_token_ids: Sequence[int] | None = None,
        activation: Literal["sigmoid", "softmax", "none"] | None = None, **options: Unpack[ScoreOptions],
    ) -> Any:  # fmt: skip
        """Process rewards: the head read at the end of each step, all solutions in one packed run (docs/steps.md).

        Args:
            question: a text or messages, for all solutions, or one for each; without steps texts as `score` takes them,
                which are read at every token of the id step_tag_id.
            steps: the texts of a solution's steps, or a list of such lists.
            reduce: one number for each solution: its least step, the product, the last one or the mean.
            separator: text behind each step, whose last token is read; default the model's step token, else a newline.
            answer: each step is a turn of the user's that the model answers so, read before the answer ("+", RLHFlow).
            step_tag_id: the token that ends a step; default the one at which the model is read.
            returned_token_ids: of a `rmfast.TokenHead`'s tokens or of labels those that are compared by a softmax, the
                right one first.
            activation: what makes step scores of rewards; default as the head says.
            options: as for `score`, but for truncation.

        Returns:
            (S,) for one solution's S steps, else a list of such tensors; with reduce a number, or (N,). On the CPU.

        Raises:
            InputError: as for `score`; a solution without steps, a step without tokens, a text without the step's tag.
            ValueError, TypeError: an argument is wrong; the head does not say what makes step scores of its rewards.
        """
        from rmfast.rewards.steps import step_scores

        return step_scores(
            self, question, steps, reduce=reduce, separator=separator, answer=answer, step_tag_id=step_tag_id,
            returned_token_ids=returned_token_ids, activation=activation, **options,  # type: ignore[misc]
        )  # fmt: skip

    @takes(ScoreOptions, "truncation")
    def values_and_reward(
        self, inputs: Sequence[Any], *, gamma: float = 1.0, lam: float = 0.95, rewards: Sequence[Any] | None = None,
        response_start: Sequence[int] | None = None, **options: Unpack[ScoreOptions],
    ) -> ResponseValues:  # fmt: skip
        """Critic and reward of PPO from one pass of the body: values, rewards, advantages and returns of all responses.

        Meant for models trained with the TCRM loss (arXiv 2604.22981), whose reward read at any token is the expected
        final one. A response token's value is that of the state in which it was chosen: the reward read one token
        before it, for the first one at the prompt's last token (or, without any, its own). The reward comes with the
        token that `score` reads, where the response ends. With gamma 1 and lam 0 an advantage is the token's credit
        r_k − r_{k−1}.

        Args:
            inputs: as for `score`. (prompt, response) pairs and messages that end with the assistant's turn say where
                their response starts: where their tokens differ from those of the prompt alone, a template's assistant
                header included. Where the policy has the same tokenizer, its own token ids are surer, with
                response_start.
            gamma, lam: as for `rmfast.values.gae`.
            rewards: added to the rewards: for each input as many numbers as its response has tokens, such as −β times
                the log-ratio to a reference policy.
            response_start: for each input the index of its response's first token.
            options: as for `score`, but for truncation, under which a response has no start.

        Returns:
            A `rmfast.ResponseValues`, on the CPU; fp32 (fp64 for an fp64 model).

        Raises:
            InputError: as for `score`, or an input whose response's start is unknown or behind the token that is read.
            ValueError, TypeError: an argument is wrong; the model is not causal, pools by itself or has several labels.
        """
        from rmfast.training.values import values_and_reward

        return values_and_reward(
            self, inputs, gamma=gamma, lam=lam, rewards=rewards, response_start=response_start,
            **options,  # type: ignore[misc]
        )  # fmt: skip

    @takes(RunOptions)
    def patch_sweep(
        self, clean: Any, corrupted: Any = None, *, mode: str | Tensor | Mapping[str, Tensor] = "denoising",
        sites: str | Sequence[str] = "resid_post", layers: int | Iterable[int] | None = None,
        positions: str | Iterable[Any] | None = None, heads: int | Iterable[int] | None = None,
        neurons: int | Iterable[int] | None = None, align: Any = "auto",
        metric: Callable[[Tensor], Any] | None = None, baseline: Sequence[Any] | None = None, seed: int = 0,
        screen: Literal["atp"] | None = None, top: int | None = None, patterns: Literal["own", "frozen"] = "own",
        checkpoint: str | os.PathLike[str] | None = None, reference: Any = None, **options: Unpack[RunOptions],
    ) -> Any:  # fmt: skip
        """Activation patching over a grid of sites: the reward of a run in which one activation is replaced, for each.

        The *base run* is the corrupted text's for denoising and the clean text's for all other modes. Rewards are those
        of the full forward with that one replacement; only the rows that it reaches are run (docs/sweep.md).

        Args:
            clean, corrupted: one text each, in any form that `score` takes, or lists of as many texts. corrupted is
                None for modes without another run.
            mode: "denoising" (clean activations into the corrupted run) or "noising" (corrupted ones into the clean
                run); on the clean run alone "zero", "mean" (of all `baseline` tokens), "resample" (at each position the
                activations of a random token of `baseline`, by `seed`), or values: a tensor that broadcasts to
                (layers, units, width), or one for each kind of sites.
            sites: a kind or several (`rmfast.patching.sites`): "resid_pre", "resid_mid", "resid_post", "attn_out",
                "mlp_out", "head_out", "mlp_neuron", "q", "k", "v".
            layers: the layers to sweep, negative from the end; default all.
            positions: "all" (the default: each by itself), "joint" (all at once), or a list of positions of the base
                run and of groups (lists, ranges, slices) that are replaced together.
            heads, neurons: which units of kinds that have them; heads default to all (K/V heads for k and v).
            align: "auto" (equal lengths position by position; else what both texts begin and end with, and between
                that the tokens that correspond; in any case the tokens where the rewards are read), "strict" (equal
                lengths only), or a map from clean to corrupted positions, which may count from the end (or a list of
                these, −1 for none). Positions without a partner are NaN and counted in `unpaired`.
            metric: a function of the rewards (K,) that gives one number, taken in their place.
            patterns: "frozen" leaves attention probabilities of edited runs those of the base run: only values change.
            screen, top: with "atp", only the `top` sites that `attribution_patch` ranks first are run, others are NaN.
            checkpoint: a file from which an interrupted sweep of the same texts, sites and model goes on.
            reference: what `rmfast.patching.divergence.fit` gives, to judge how far what is put in is from it.
            options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`). An edited run
                must fit into batch_tokens, whose default is twice that of `score`.

        Returns:
            A `rmfast.PatchSweep`, or for lists one for each pair.

        Raises:
            ValueError, TypeError: an argument is wrong, the texts do not differ, or the model's layers lack a part that
                a kind names.
        """
        from rmfast.patching.sweep import patch_sweep  # with scipy, which takes 0.5 s

        return patch_sweep(
            self, clean, corrupted, mode=mode, sites=sites, layers=layers, positions=positions, heads=heads,
            neurons=neurons, align=align, metric=metric, baseline=baseline, seed=seed, screen=screen, top=top,
            checkpoint=checkpoint, patterns=patterns, reference=reference, **options,
        )  # fmt: skip

    @takes(Encoding)
    def attribution_patch(
        self, clean: Any, corrupted: Any = None, *, mode: str | Tensor | Mapping[str, Tensor] = "denoising",
        sites: str | Sequence[str] = "resid_post", layers: int | Iterable[int] | None = None,
        positions: str | Iterable[Any] | None = None, heads: int | Iterable[int] | None = None,
        neurons: int | Iterable[int] | None = None, align: Any = "auto",
        metric: Callable[[Tensor], Any] | None = None, baseline: Sequence[Any] | None = None, seed: int = 0,
        **options: Unpack[Encoding],
    ) -> Any:  # fmt: skip
        """Attribution patching (AtP): what `patch_sweep` gives, estimated for all sites from one backward pass.

        The effect of a site is taken as the reward's gradient at the base run times the change of the activation.
        Arguments, results and errors are those of `patch_sweep`; options say how texts become token ids
        (`rmfast.engine.options.Encoding`).
        """
        from rmfast.patching.sweep import attribution_patch

        return attribution_patch(
            self, clean, corrupted, mode=mode, sites=sites, layers=layers, positions=positions, heads=heads,
            neurons=neurons, align=align, metric=metric, baseline=baseline, seed=seed, **options,
        )  # fmt: skip

    @takes(RunOptions)
    def attribute(
        self,
        inputs: Any,
        *,
        components: str | Sequence[str] = ("embedding", "attn_out", "mlp_out"),
        positions: Literal["last", "all"] = "last",
        norm: Literal["frozen", "raw"] = "frozen",
        **options: Unpack[RunOptions],
    ) -> Any:
        """Direct attribution: the reward of a text as a sum over components, from one pass of the body.

        Args:
            inputs: one text, of any form that `score` takes, or a list of texts.
            components: of "embedding" (the stream that enters the first layer), "attn_out" or in its place "head_out"
                (heads, and the output projection's bias), "mlp_out" or in its place "mlp_neuron" (neurons, and the down
                projection's bias).
            positions: "last", the token at which `score` reads, or "all": the rewards of `token_values`.
            norm: "frozen" takes the final norm, its scale frozen at what it is, into every contribution: they sum to
                the reward. "raw" leaves it out, w·o_c (arXiv 2604.26130): their sum is not the reward.
            options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`).

        Returns:
            A `rmfast.Attribution`, or for a list one for each text.

        Raises:
            ValueError, TypeError: an argument is wrong; the model's head is not one linear map of a token's stream, its
                layers lack a part, or their parts do not add up to the stream (BERT).
        """
        from rmfast.interpret.attribution import attribute

        return attribute(self, inputs, components=components, positions=positions, norm=norm, **options)

    @takes(RunOptions)
    def sae_attribution(
        self,
        inputs: Any,
        sae: SAE,
        *,
        layer: int | None = None,
        site: str | None = None,
        positions: Literal["last", "all"] = "last",
        norm: Literal["frozen", "raw"] = "frozen",
        top: int | None = None,
        **options: Unpack[RunOptions],
    ) -> Any:
        """What features of a sparse autoencoder add to the reward, f_i (W_dec γ⊙w)_i, from one pass of the body.

        Args:
            inputs: one text, of any form that `score` takes, or a list of texts.
            sae: a `rmfast.SAE` of the model's width (`rmfast.SAE.load` reads a folder of SAELens).
            layer, site: the stream it reads, site of "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out";
                default what its hook_name says.
            positions: "last", the token at which `score` reads, or "all": the rewards of `token_values`.
            norm: as for `attribute`.
            top: features of a token that are kept, those of largest contribution; default k of a TopK SAE, else 64.
            options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`).

        Returns:
            A `rmfast.SAEAttribution`, or for a list one for each text.

        Raises:
            ValueError, TypeError: as `attribute`; the SAE's width is not the model's, or its hook_name names no place
                that rmfast knows, and layer or site is not given.
        """
        from rmfast.interpret.sae_attribution import sae_attribution

        return sae_attribution(
            self, inputs, sae, layer=layer, site=site, positions=positions, norm=norm, top=top, **options
        )

    def with_interventions(self, *interventions: Intervention) -> RewardModel:
        """This model under interventions: `NeuronClamp`, `DirectionRemoval`, `LengthPenalty`, `LWR`, or sums of them.

        Any number of such models live side by side with this one, which stays as it is, and share its weights. Clamps
        at all positions are folded into copies of the matrices that they touch; such a model is refused once modules,
        hooks, forwards, settings, adapters, the clamped matrices or which tensors the weights are have changed. What
        else is changed in this model's weights in place is seen. (docs/interventions.md)

        Raises:
            ValueError: an intervention was made with another model, names modules or neurons that this one lacks, does
                not fit its width, or clashes with another; the model pools by itself, so that it has no last token.
            TypeError: one is no intervention.
        """
        from rmfast.debias.apply import intervened

        return intervened(self, interventions)

    @takes(RunOptions)
    def lens(
        self,
        inputs: Sequence[Any],
        *,
        positions: Literal["last", "all"] = "last",
        norm: Literal["final", "frozen", "raw"] = "final",
        **options: Unpack[RunOptions],
    ) -> Lens:
        """The reward lens: what the head makes of the residual stream after each layer, from one pass of the body.

        Args:
            inputs: as for `score`; for pairs a chosen and a rejected text alternately.
            positions: "last", the token at which `score` reads, or "all".
            norm: "final" applies the final norm to each layer's stream as it does to the last one's. "frozen" gives it
                the scale that it has on the last one, so that differences of layers are what attention and MLP add to
                the reward. "raw" leaves it out, w·h + b (arXiv 2604.26130): its last layer is not the reward.
            options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`).

        Returns:
            A `rmfast.Lens`.

        Raises:
            InputError, ValueError, TypeError: as `score`; the model's body has no list of its layers, it pools by
                itself, or (other norms than "final") its head is not one linear map or its final norm of no known kind.
        """
        from rmfast.interpret.lens import lens

        return lens(self, inputs, positions=positions, norm=norm, **options)

    @takes(RunOptions)
    def compare(
        self,
        clean: Sequence[Any],
        corrupted: Sequence[Any],
        *,
        sites: str | Sequence[str] = ("attn_out", "mlp_out"),
        layers: int | Iterable[int] | None = None,
        heads: int | Iterable[int] | None = None,
        neurons: int | Iterable[int] | None = None,
        mode: Literal["noising", "denoising"] = "noising",
        norm: Literal["frozen", "raw"] = "frozen",
        align: Any = "auto",
        label: int | None = None,
        confidence: float = 0.95,
        seed: int = 0,
        **options: Unpack[RunOptions],
    ) -> Comparison:
        """Does attribution predict patching? Both over pairs of texts, and how their ranks of the sites agree.

        For each pair the difference of both texts' contributions (`attribute`, at the read token), beside what patching
        the same components does (`patch_sweep`, all positions jointly).

        Args:
            clean, corrupted: as many texts each, at least 10.
            sites: of "attn_out", "mlp_out", "head_out", "mlp_neuron"; those with the same units together.
            layers, heads, neurons, mode, align: as for `patch_sweep`.
            norm: as for `attribute`.
            label: which reward of a model with K > 1.
            confidence: of the intervals, in (0, 1).
            seed: of the bootstrap.
            options: max_length, truncation, format, batch_tokens, progress (`rmfast.engine.options`).

        Returns:
            A `rmfast.Comparison`.

        Raises:
            ValueError, TypeError: as `patch_sweep` and `attribute`; too few pairs or sites.
        """
        from rmfast.interpret.comparison import compare_attribution

        return compare_attribution(
            self, clean, corrupted, sites=sites, layers=layers, heads=heads, neurons=neurons, mode=mode, norm=norm,
            align=align, label=label, confidence=confidence, seed=seed, **options,
        )  # fmt: skip


def load(
    path_or_id: Any,
    *,
    dtype: Any = None,
    device: Any = None,
    trust_remote_code: bool = False,
    pooling: str | int = "auto",
    invariant: bool | None = None,
    compute: Literal["auto", "native", "fp32"] = "auto",
    head: Any = None,
    cuda_graphs: bool = False,
    **kw: Any,
) -> RewardModel:
    """Load a reward model and its tokenizer with transformers.

    Arguments are checked before weights are read. The model runs as a whole when it is first used: what only that shows
    (activations that overflow) is an error then.

    Args:
        path_or_id: a folder or hub id of a sequence- or token-classification checkpoint, of one with a head that is
            known by its tensors (docs/heads.md), or of a peft adapter on one, or on a language model to which it brings
            a head.
        dtype: a torch dtype or its name; default the checkpoint's own.
        device: where the weights go; default a CUDA GPU where there is one, else the CPU. Not with device_map.
        trust_remote_code: run the checkpoint's own Python code.
        pooling, invariant, compute, head, cuda_graphs: as for `RewardModel`; head may also be the name of a Linear, or
            of layers with ReLU between them, in the checkpoint ("v_head").
        **kw: passed to from_pretrained: device_map, quantization_config, revision, subfolder, num_labels, ...

    Raises:
        ValueError: the checkpoint is no reward model; or it lacks weights that the reward depends on, has them in
            another shape, or has some that the model has no place for: the message names them.
        OSError: there is no such checkpoint (from transformers).
    """
    options: dict[str, Any] = {"invariant": invariant, "compute": compute, "cuda_graphs": cuda_graphs}
    check_options(pooling, **options)  # before gigabytes are loaded
    model, tokenizer, found = load_checkpoint(
        path_or_id, dtype=dtype, device=device, trust_remote_code=trust_remote_code, head=head, pooling=pooling,
        compute=compute, **kw,
    )  # fmt: skip
    return RewardModel.loaded(model, tokenizer, pooling=pooling, head=found, **options)
