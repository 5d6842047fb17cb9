"""Records, templates, tokenisation, and batches that are functions of (seed, step)."""
