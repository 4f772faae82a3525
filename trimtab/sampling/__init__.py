"""Sampling: prompts -> answers with their log-probabilities, on the live model or on a vLLM server.

`answers.py` is an own decode loop; how a model reads tokens is in `decoders.py`, how a token is chosen in `draws.py`.
`vllm.py` takes the same call to a server.
"""

from trimtab.sampling.answers import Sampler, Samples, sample
from trimtab.sampling.vllm import VllmServer

__all__ = ["Sampler", "Samples", "VllmServer", "sample"]
