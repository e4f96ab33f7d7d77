"""Reward heads as data: programs over rows of the final normed stream, found by the names of their tensors."""

from rmfast.heads.binned import Binned
from rmfast.heads.fitting import fit, rows
from rmfast.heads.function import FunctionHead
from rmfast.heads.gated import Gated
from rmfast.heads.gaussian import Gaussian
from rmfast.heads.head import Head
from rmfast.heads.linear import MLP, Layers, Linear
from rmfast.heads.quantile import Quantile
from rmfast.heads.tokens import TokenHead
from rmfast.heads.two_way import TwoWay

__all__ = [
    "MLP",
    "Binned",
    "FunctionHead",
    "Gated",
    "Gaussian",
    "Head",
    "Layers",
    "Linear",
    "Quantile",
    "TokenHead",
    "TwoWay",
    "fit",
    "rows",
]
