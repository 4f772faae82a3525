"""Settings that every test runs under: no network, one thread per process, and shapes that are checked."""

import os

# Before anything imports them: the hub libraries and the thread pools read these once. Child processes inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401 - the hook below looks its checker up by name

# The pure layer's annotations are checked, shapes included, whenever a test calls one of its functions.
CHECKED = ["trimtab.batches", "trimtab.layout", "trimtab.kl", "trimtab.losses", "trimtab.advantages"]
install_import_hook(CHECKED, "tests.shapes.check")

import torch

torch.set_num_threads(1)
