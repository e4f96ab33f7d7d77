"""Reruns of the token at which a text is scored (`rmfast.debias.last_token`)."""

from rmfast.debias.last_token import LastTokenRuns

__all__ = ["LastTokenRuns"]
