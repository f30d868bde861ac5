"""The data doctor: what is wrong with pairs, as text and as tokens, before a GPU is warm."""
