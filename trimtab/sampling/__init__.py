"""Sampling: prompts -> answers with their log-probabilities, by an own decode loop on the live model.

`answers.py` is the loop; how a model reads tokens is in `decoders.py`, how a token is chosen in `draws.py`.
"""

from trimtab.sampling.answers import Samples, sample

__all__ = ["Samples", "sample"]
