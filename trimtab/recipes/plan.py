"""`trimtab plan`: what training a model takes on some devices, by method and sharding, and what fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trimtab.plan import Row, Size


@dataclass(frozen=True)
class Plan:
    """Reads a model's config, not its weights, and runs nothing. Figures are estimates: docs/many_devices.md."""

    model: str
    """Hub id, folder, run directory, or built-in: smollm2-135m-instruct, tiny."""
    memory: float
    """GiB of each device."""
    devices: int = 1
    """How many there are."""
    batch_size: int = 16
    """Rows per optimizer step (a pair is two)."""
    micro_batch_rows: int = 16
    """Most rows of one forward and backward pass."""
    max_length: int = 1024
    """Tokens of every row: the estimate is for the longest."""
    max_new_tokens: int = 256
    """Tokens of an answer, of methods that sample."""
    batch_rows: int = 32
    """Answers sampled at the same time."""
    lora_rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    reward: str | None = None
    """Reward model of methods that sample; a rule or function, which takes no memory, unless given."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the model's body over float32 weights."""
    tflops: float = 400.0
    """Operations that a device does in products, 10^12 a second: about half of what its makers say."""
    bandwidth: float = 2500.0
    """10^9 bytes a second of a device's own memory."""
    link: float = 100.0
    """10^9 bytes a second between devices."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such models are refused."""


def plan(config: Plan) -> None:
    """Size the model, estimate every method, say what fits."""
    from trimtab.plan import KINDS, Device, Work, rows, size_of
    from trimtab.weights import load_config, resolve

    check(config)

    def sized(source: str, rank: int = 0) -> Size:
        code = config.trust_remote_code
        loaded = load_config(resolve(source), trust_remote_code=code)
        return size_of(loaded, bf16=config.dtype == "bfloat16", lora_rank=rank, remote_code=code)

    size = sized(config.model, config.lora_rank)
    work = Work(
        rows=config.batch_size,
        micro_batch_rows=min(config.micro_batch_rows, -(-config.batch_size // config.devices)),
        length=config.max_length,
        new_tokens=config.max_new_tokens,
        sampled_rows=config.batch_rows,
        devices=config.devices,
        reward=sized(config.reward).weights if config.reward else 0,
    )
    device = Device(config.tflops * 1e12, config.bandwidth * 1e9, config.link * 1e9)
    trained = f", {size.trained / 1e6:.1f} million of them train" if config.lora_rank else ""
    print(f"{config.model}: {size.weights / 1e9:.3g} billion weights{trained}")
    show(rows(dict.fromkeys(KINDS, size), work, device, config.memory * 2**30))


def check(config: Plan) -> None:
    """Refuse numbers that mean nothing, by the name of their flag."""
    names = ("memory", "devices", "batch_size", "micro_batch_rows", "max_length", "max_new_tokens", "batch_rows")
    for name in (*names, "tflops", "bandwidth", "link"):
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value}: a number above 0 is needed.")
    if config.lora_rank < 0:
        raise ValueError(f"--lora-rank {config.lora_rank}: a rank above 0, or 0 to train all weights.")


WAYS = ("--shard", "layers again", "drawn split")
COLUMNS = (
    *("start", "weights", "frozen", "optimizer", "gradients"),
    *("activations", "logits", "together", "sampling", "peak"),
)


def show(found: list[Row]) -> None:
    """A table of GiB on each device."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", *WAYS, *COLUMNS, "s/step", "fits", title="GiB on each device")
    for row in found:
        sizes = [f"{row.memory[name] / 2**30:.2f}" for name in COLUMNS]
        work = row.work
        ways = ("full" if work.split else "none", *("yes" if way else "no" for way in (work.recompute, work.apart)))
        table.add_row(row.method, *ways, *sizes, f"{row.seconds:.3g}", "yes" if row.fits else "NO")
    Console(width=None if Console().is_terminal else 200).print(table)
