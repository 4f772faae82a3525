"""Which arithmetic a model's body runs in, and how float32 products are computed after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Precision:
    """The type that a model's body computes in; `autocast` is None for float32. Weights are float32 either way.

    `why` says in words how the choice was made, for the run's records.
    """

    autocast: torch.dtype | None
    why: str
    keeps_copies: bool = True
    """Whether the weights that autocast has rounded are kept as long as a context is open."""

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """Where the body runs."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast, cache_enabled=self.keeps_copies)


def choose_dtype(requested: str, device: torch.device) -> Precision:
    """The precision for `auto`, `float32` or `bfloat16`: auto is bf16 autocast where the processor has bf16.

    Raises ValueError for another name.
    """
    if requested not in DTYPES:
        raise ValueError(f"--dtype {requested}: allowed are {', '.join(DTYPES)}.")
    if requested == "float32":
        return Precision(None, "float32, as asked")
    if requested == "bfloat16":
        return Precision(torch.bfloat16, "bf16 autocast over float32 weights, as asked")
    if has_bf16(device):
        return Precision(torch.bfloat16, f"bf16 autocast over float32 weights: this {device.type} has bf16")
    return Precision(None, f"float32: this {device.type} has no bf16 instructions")


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # Which of these private probes exists changes between torch versions; the kernel's list of flags does not.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe) or bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return set()
    lines = (line.partition(":") for line in listing.read_text().splitlines())
    return {flag for key, _, value in lines if key.strip() in ("flags", "Features") for flag in value.split()}


def choose_device(requested: str) -> torch.device:
    """The device for `auto` (cuda where there is one), `cpu`, `cuda` or `cuda:1`. Raises ValueError for others."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ValueError(f"--device {requested}: allowed are auto, cpu, cuda and cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {requested}: allowed are auto, cpu, cuda and cuda:N.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {requested}: this machine has {count} CUDA devices. Try --device auto.")
    return device


@contextmanager
def fast_products(device: torch.device, *, allowed: bool) -> Iterator[None]:
    """Where float32 matrix products may round their factors (to bf16 on CPUs, TF32 on CUDA).

    Sums and results stay float32, so logits keep their digits; autocast would round the logits themselves to 8 bits.
    On processors whose oneDNN does not take the offer, the products are exact and still twice as fast as the default.
    """
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # pyright: ignore
    before = backend.fp32_precision
    with torch.autocast(device.type, enabled=False):
        if allowed:
            backend.fp32_precision = "tf32" if device.type == "cuda" else "bf16"
        try:
            yield
        finally:
            if allowed:
                backend.fp32_precision = before
