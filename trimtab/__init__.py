"""Steer language models with human preferences, and see when the steering is being gamed."""

__version__ = "0.1.0"
