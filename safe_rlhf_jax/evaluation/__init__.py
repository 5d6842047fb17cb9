"""Evaluation of trained policies on held-out prompts, and the report."""
