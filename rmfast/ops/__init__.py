"""The ops: schema, checks, fakes and autograd. Which kernel runs `rmfast.backends` decides."""

from rmfast.ops._reward_head import reward_head
from rmfast.ops._suffix_attention import suffix_attention

__all__ = ["reward_head", "suffix_attention"]
