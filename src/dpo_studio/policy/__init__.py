"""The policy and its moving reference: the only package that knows that a policy is a LoRA adapter of PEFT."""
