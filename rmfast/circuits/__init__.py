"""Circuits: which parts of a model a reward goes through, and along which paths between them."""
