"""Ahead-of-time analysis of compiled programs: memory, traffic, collectives, and projected speed on a chip."""
