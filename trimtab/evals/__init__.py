"""Measures of a trained model or a reward: how accurate, how far from the reference, and how sure that is."""
