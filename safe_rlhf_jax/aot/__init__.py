"""What a compiled program needs and does: memory, traffic, collectives, and how fast a chip could run it."""
