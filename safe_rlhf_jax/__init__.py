"""Safe RLHF on JAX: maximise reward subject to a constraint on expected cost."""
