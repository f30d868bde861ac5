"""Frozen weights: the kinds there are, how each is formed, the one product with them and the layer that holds one."""
