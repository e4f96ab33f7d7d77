"""The ops: schema, checks, fakes and autograd. Which kernel runs `rmfast.backends` decides."""

from rmfast.ops._binned_mmd import binned_mmd
from rmfast.ops._linear import linear
from rmfast.ops._neuron_stats import neuron_stats
from rmfast.ops._patch_rows import patch_rows
from rmfast.ops._reward_head import reward_head
from rmfast.ops._suffix_attention import suffix_attention
from rmfast.ops._tcrm import tcrm
from rmfast.ops._token_wise import gated_activation, rms_norm, rotary
from rmfast.ops._topk_encode import topk_encode

__all__ = [
    "binned_mmd",
    "gated_activation",
    "linear",
    "neuron_stats",
    "patch_rows",
    "reward_head",
    "rms_norm",
    "rotary",
    "suffix_attention",
    "tcrm",
    "topk_encode",
]
