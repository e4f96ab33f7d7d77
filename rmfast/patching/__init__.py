"""Activation patching: places inside a model, edits at them, and the sweeps that run them all."""
