"""Several processes, one device each: who does what, how it comes together, and weights split over all of them.

Every process (a "rank") reads the same rows in the same order and holds the whole of every batch, which is small. What
is shared out is work: the passes of models, sampling, rewards. Sums of losses, counts and gradients add up over ranks
as they do over micro-batches, and what was drawn or scored is exchanged at once. So everything between (whitening, the
history of scores, the mean of a KL, the choice of pairs) is computed from the same numbers on every rank, needs no
exchange, and does not know how many ranks there are. On one rank all of this is nothing.

Weights are split by torch's FSDP2; processes are started by torchrun or, on one machine, by `launch`.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

from trimtab.batches import Mean, PerToken, Tokens, pieces
from trimtab.progress import console
from trimtab.untrusted import printable

T = TypeVar("T")
S = TypeVar("S")

TIMEOUT = timedelta(hours=1)
"""How long a rank waits for the others: longer than the slowest reward. One that fails is told, and not waited for."""
SECONDS_TO_STOP = 600
"""How long ranks that are asked to stop may take to end their step and save."""
ENOUGH = 0.9
"""The share of the free memory that a policy's weights may take when they are put together for sampling."""
INTERRUPTED = 130
"""The exit status after Ctrl-C."""


# ---- The ranks


class OtherRankFailed(RuntimeError):
    """Another rank failed, and this one ends because of it; the message is that rank's."""


def ranks() -> int:
    """How many processes work on this command."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the rank that writes files and speaks."""
    return rank() == 0


def start() -> None:
    """Join the other processes that torchrun started, if it did; all but the first rank fall silent.

    Raises ValueError if there are more processes on this machine than CUDA devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    on_cuda, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if on_cuda:
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {torch.cuda.device_count()} CUDA "
                "devices: start one for each, or set CUDA_VISIBLE_DEVICES to nothing and use processors."
            )
        torch.cuda.set_device(local)
    store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
    store = PrefixStore(name_of_start(store, number, count), store)
    # Both, so that small things are exchanged without the device.
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    if not is_first():
        console.quiet = True
        warnings.simplefilter("ignore")


def name_of_start(store: Store, number: int, count: int) -> str:
    """A name for this start of `count` processes that all of them know, of which this is the one with this number.

    torchrun keeps what was stored by processes that it has started before, and who finds that waits for the dead. So
    each process asks the first one, under a name of its own.
    """
    own = uuid4().hex
    if not number:
        for other in range(1, count):
            tell_name(store, own, other)
        return own
    store.set(f"name of {number}", own)
    name = store.get(f"start of {own}").decode()
    store.set(f"{name} known to {number}", "")
    return name


def tell_name(store: Store, name: str, other: int) -> None:
    """Tell another process the name of this start, under any name that it has or had, until it knows."""
    while not store.check([f"{name} known to {other}"]):
        if store.check([f"name of {other}"]):
            store.set(f"start of {store.get(f'name of {other}').decode()}", name)
        time.sleep(0.02)


def finish() -> None:
    """Part from the other ranks, once all of them are done.

    A process group that ends while split weights are alive can abort the process.
    """
    if not dist.is_initialized():
        return
    gc.collect()
    meet()
    mesh_of.cache_clear()
    dist.destroy_process_group()


def leave(status: int) -> None:
    """End this process, once all ranks are done; on one rank, nothing.

    At once: threads of a process group that is taken apart while split weights are alive can abort the interpreter as
    it ends, after all is written.
    """
    if not dist.is_initialized():
        return
    meet()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclass(frozen=True)
class Leaving:
    """Ends this process at once where an error leaves the block; the rank that failed first says why.

    Other ranks may be waiting for this one, and a process group that is taken apart would wait for them. `users` are
    the errors that are told in a line, with exit status `status`; others come with their traceback.
    """

    users: tuple[type[Exception], ...]
    status: int

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is None:
            return
        store = dist.distributed_c10d._get_default_store()  # the only one that all ranks know
        if store.add("failed", 1) == 1:
            told = (*self.users, OtherRankFailed, KeyboardInterrupt)
            if os.environ.get("TRIMTAB_DEBUG") or not isinstance(error, told):
                traceback.print_exception(error)
            who = "" if isinstance(error, OtherRankFailed) else f"rank {rank()} of {ranks()}: "
            said = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{who}{error or type(error).__name__}"
            print(f"trimtab: {printable(said)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status if isinstance(error, Exception) else INTERRUPTED)


def meet() -> None:
    """Wait until every rank is here."""
    gather(None)


# ---- Work that is not a model's


class AllOrNone:
    """Work that every rank does by itself; if one fails in it, all do: the others raise `OtherRankFailed`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        told = None if error is None else f"{type(error).__name__}: {error}"
        if ranks() == 1 or (error is not None and not isinstance(error, Exception)):
            return
        for other, message in enumerate(gather(told)):
            if error is None and message is not None:
                raise OtherRankFailed(f"rank {other} of {ranks()} failed: {message}")


def gather(value: T) -> list[T]:
    """What every rank gives, in their order."""
    if ranks() == 1:
        return [value]
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, value)
    return found


def largest(number: int) -> int:
    """The largest of the numbers that ranks give."""
    if ranks() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def shares(count: int) -> list[range]:
    """What each rank has of `count` things: neighbours, as many as the others but for one."""
    return [range(count * i // ranks(), count * (i + 1) // ranks()) for i in range(ranks())]


def over_ranks(work: Callable[[Sequence[T]], Iterable[S]], things: Sequence[T], *, meeting: bool = False) -> list[S]:
    """`work(things)`, in order and on every rank, each rank doing its share; where one fails, all do.

    With `meeting`, ranks meet inside the work: all of them begin it, even with nothing to do, and who fails ends at
    once, for the others could not be told.
    """
    mine, done = shares(len(things))[rank()], []
    with nullcontext() if meeting else AllOrNone():
        if mine or meeting:
            done = list(work(things[mine.start : mine.stop]))
    return [one for part in gather(done) for one in part]


def first_tells(work: Callable[[], T]) -> T:
    """What `work` gives on the first rank, on all of them."""
    found: list[Any] = [None]
    with AllOrNone():
        if is_first():
            found = [work()]
    if ranks() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


# ---- Passes of models


def own_pieces(item_rows: Sequence[int], max_rows: int) -> list[tuple[Tensor, bool]]:
    """This rank's items of a batch in pieces of at most `max_rows` rows, and whether they count; no item is torn.

    All ranks get equally many, for a split model runs on all of them at once. Where one has too few, it runs the first
    item again, which does not count there.
    """
    plans = [
        [torch.arange(mine.start + piece.start, mine.start + piece.stop) for piece in pieces(rows, max_rows)]
        for mine in shares(len(item_rows))
        for rows in [item_rows[mine.start : mine.stop]]
    ]
    plan = plans[rank()]
    return [(piece, True) for piece in plan] + [(torch.arange(1), False)] * (max(map(len, plans)) - len(plan))


@torch.no_grad()
def in_chunks(
    function: Callable[[Tokens], PerToken], tokens: Tokens, max_rows: int, *, order: Tensor | None = None
) -> PerToken:
    """A function of rows on all rows, at most `max_rows` at a time, each rank doing its share; on the CPU.

    Rows run together as they follow each other in `order`.
    """
    found = torch.zeros(tokens.ids.shape)
    for places, counts in own_pieces([1] * len(tokens), max_rows):
        rows = places if order is None else order[places]
        values = function(tokens.select(rows)).float().cpu()
        if counts:
            found[rows, tokens.used_columns(rows)] = values
    if ranks() > 1:
        dist.all_reduce(found)  # every number is some rank's, and zero elsewhere
    return found


@contextmanager
def in_step(run: Callable[[Callable[[], T]], T], idle: Callable[[], Any]) -> Iterator[Callable[[Callable[[], T]], T]]:
    """A way to run passes of a split model of which no rank knows beforehand how many others will make.

    Before each pass ranks tell each other whether any has one to make; a rank that has left this runs `idle` with those
    that have not. An error leaves at once: in a pass nobody listens.
    """

    def together(task: Callable[[], T]) -> T:
        largest(1)
        return run(task)

    yield together
    while largest(0):
        run(idle)


# ---- Sums


def add_means(loss: Mean, metrics: dict[str, Mean]) -> tuple[Mean, dict[str, Mean]]:
    """A loss and its metrics with those of the other ranks added, in float64."""
    if ranks() == 1:
        return loss, metrics
    means, device = [loss, *metrics.values()], loss.total.device
    numbers = torch.stack([part.detach().to(device).double() for mean in means for part in (mean.total, mean.count)])
    dist.all_reduce(numbers)
    added = [Mean(total, count) for total, count in numbers.view(-1, 2)]
    return added[0], dict(zip(metrics, added[1:], strict=True))


def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of weights that every rank has whole; those of split ones have been added on the way."""
    if ranks() == 1:
        return
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor) and parameter.requires_grad]
    if not whole:
        return
    used = torch.tensor([parameter.grad is not None for parameter in whole], dtype=torch.int32)
    dist.all_reduce(used)
    for parameter, count in zip(whole, used.tolist(), strict=True):
        if count:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)


# ---- Split weights


@cache
def mesh_of(device: str) -> DeviceMesh:
    """All ranks in one line."""
    return init_device_mesh(device, (ranks(),))


def split_weights(module: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> None:
    """Split a module's weights over the ranks (FSDP2), its layers one by one and then what is left.

    Gradients are summed, not averaged: the learner divides. Run the module by calling it or its `run` alone; all ranks
    together. Weights are together only while that lasts.
    """
    for part in (*layers, module):
        fully_shard(part, mesh=mesh_of(device.type), reshard_after_forward=True)
        assert isinstance(part, FSDPModule)
        # gloo does not know the products that come before sums.
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
    register_fsdp_forward_method(module, "run")


def here(tensor: Tensor) -> Tensor:
    """This rank's part of a split tensor, in the same memory; another tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def together(tensor: Tensor) -> Tensor:
    """The whole of a split tensor; another tensor itself. All ranks ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a split tensor in the first rank's own memory, nothing elsewhere; another tensor itself.

    All ranks ask at once.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    whole = together(tensor.detach())
    return whole.cpu() if is_first() else whole.new_empty(0)


def split_as(whole: Tensor, other: Tensor) -> Tensor:
    """A tensor that every rank has whole, split as another one is; itself where that is whole."""
    if not isinstance(other, DTensor):
        return whole
    parts = distribute_tensor(whole.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return parts.clone()  # a part alone would keep the whole


def fill(blank: nn.Module, network: nn.Module, *, everywhere: bool) -> None:
    """Put the weights of a split network into a blank one of the same kind: of all ranks, or of the first alone.

    The first alone keeps them in its own memory and not on the device, for saving.
    """
    for parameter, split in zip(blank.parameters(), network.parameters(), strict=True):
        whole = together(split.detach())
        if everywhere:
            parameter.data = whole
        elif is_first():
            parameter.data = whole.cpu()


def empty(blank: nn.Module) -> None:
    """Take the weights out again."""
    for parameter in blank.parameters():
        parameter.data = parameter.data.new_empty(0)


def has_room(network: nn.Module, device: torch.device, *, copies: float) -> bool:
    """Whether `copies` times a split network's weights fit together in what is free on every rank's device."""
    needed = copies * sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    return needed <= ENOUGH * min(gather(free_bytes(device)))


def free_bytes(device: torch.device) -> float:
    """Memory that is free for this rank."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    known = Path("/proc/meminfo")
    if not known.exists():
        return float("inf")
    lines = dict(line.split(":", 1) for line in known.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


# ---- Starting


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run a command in `count` processes of this machine, as torchrun does; the exit status, 130 after Ctrl-C."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the rank that fails says why
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="trimtab",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "trimtab", *arguments)
    except ChildFailedError as error:
        number, first = error.get_first_failure()
        if first.exitcode < 0:  # it could not say so itself
            print(f"trimtab: rank {number} of {count} was ended by signal {-first.exitcode}", file=sys.stderr)
            return 128 - first.exitcode
        return first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0
