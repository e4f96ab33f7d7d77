"""Concepts: directions of the residual stream that stand for an attribute, and the reward along them and without them."""
