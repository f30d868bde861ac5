"""Judges, and the statistics of what they and held-out pairs say."""
