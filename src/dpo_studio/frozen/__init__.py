"""Frozen weights: their kinds, how each is dequantised, the one product with them, and the layer that has one."""
