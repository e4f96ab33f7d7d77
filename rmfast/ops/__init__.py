"""The ops: schema, checks, fakes and autograd. Which kernel runs `rmfast.backends` decides."""

from rmfast.ops._reward_head import reward_head

__all__ = ["reward_head"]
