"""Losses for training reward models, and a trained one as its own critic."""
