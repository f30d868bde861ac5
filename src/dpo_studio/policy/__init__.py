"""What is trained, and what it is held close to: the only room that knows a policy is a LoRA adapter of PEFT's."""
