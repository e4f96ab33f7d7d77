"""A reward model as its own critic (`rmfast.training.values`)."""

from rmfast.training.values import ResponseValues, gae, values_and_reward

__all__ = ["ResponseValues", "gae", "values_and_reward"]
