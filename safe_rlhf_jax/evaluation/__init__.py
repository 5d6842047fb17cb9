"""What the trained policies do on held-out prompts, and the report that shows it."""
