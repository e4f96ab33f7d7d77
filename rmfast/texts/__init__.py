"""Texts in and out: inputs to token ids, preference pairs, files of rows."""
