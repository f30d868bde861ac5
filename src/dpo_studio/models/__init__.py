"""Weights: bases, adapters, and the attention mask a pack needs."""
