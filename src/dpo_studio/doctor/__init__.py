"""The data doctor: checks of pairs, as text and as tokens, before a training."""
