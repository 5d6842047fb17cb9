"""Safe RLHF as five verbs: generate, score, estimate advantages, update the constraint, update the networks."""
