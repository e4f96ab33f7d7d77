"""reward-lens (arXiv 2604.26130) on rmfast's engines: `enable()`, and its own calls run here, with the same numbers.

What is replaced, and put back by `disable()`:

    HFRuntime.final_head_inputs, full_head_inputs    scores and prefix scores: packed texts, shared prefixes run once
    PatchGrid.measure                                component and head grids: the suffix engine
    RewardModel's forward with cache, of one text    ComponentAttribution, RewardLens: one packed run
    ActivationPatcher's three grids (2.0.1)          the suffix engine

The numbers are reward-lens' own: its lens and attribution leave the final norm out, activations are exchanged between
positions of the same index, and each reward is read where it reads it. A call that these engines do not give the same
numbers for (hooks on the model, other heads, texts of different lengths where padding changes them) runs reward-lens'
own code; `explain()` says which calls did, and why.
"""

from rmfast.integrations.reward_lens.switch import SUPPORTED, disable, enable, explain

__all__ = ["SUPPORTED", "disable", "enable", "explain"]
