"""Safe RLHF as five verbs: generate, score, update the constraints, estimate advantages, update the networks."""
