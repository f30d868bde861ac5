"""Answers sampled from a model, the same ones every time."""
