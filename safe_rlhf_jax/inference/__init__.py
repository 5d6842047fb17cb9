"""Sampling from a language model on the device."""
