"""Concepts: directions of the residual stream for an attribute, and the reward along them and without them."""
