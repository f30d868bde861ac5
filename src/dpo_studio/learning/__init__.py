"""The algorithm: log-probs, the reference, the training loop and its checkpoints."""
