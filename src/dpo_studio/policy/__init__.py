"""The policy and its moving reference: a LoRA adapter on a frozen base, which others see as `Policy` alone."""
