"""Step 12 of 12: what the trained policies do on held-out prompts, and the report that shows it."""
