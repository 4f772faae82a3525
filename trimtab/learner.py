"""One optimizer step: the only `backward()` of the project.

A batch is cut into micro-batches, gradients of *sums* add up, and one division by the whole batch's count ends the
step. So the gradient does not depend on how the batch was cut. A loss that looks across the batch gets there in two
passes (gradient caching, Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"):
the outputs of all rows without a graph, the loss and its gradient with respect to those outputs, then each micro-batch
again with that gradient at its outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab import parallel
from trimtab.batches import Batch, Mean, move
from trimtab.checkpoint import State, copy_weights
from trimtab.objectives import Metrics, Objective

MicroBatch = tuple[Any, bool]
"""Some items of a batch, and whether they count on this rank."""
Part = tuple[Tensor, tuple[Mean, Metrics] | None]
"""A scalar to run backward from, and the figures that came with it."""


@dataclass
class Learner:
    """A model, what it minimizes and how: `step` changes the weights, `evaluate` only looks.

    `micro_batch_rows` bounds the rows of one forward pass; `max_grad_norm` clips the gradient norm of each network
    (0: no clip), so that a critic's error does not decide how far the policy moves.
    """

    model: Any
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    micro_batch_rows: int
    max_grad_norm: float = 1.0
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on `batch`; returns its figures, means over the whole batch.

        Raises FloatingPointError before the weights change if the loss or its gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss, metrics = self._accumulate(batch)
        if not loss.count:
            raise ValueError("nothing in this batch counts: all its weights are 0. Check the column `weight`.")
        self._divide_gradients(loss.count)
        grad_norm = self._clip()
        _check_finite(loss=loss.item(), grad_norm=grad_norm.item())
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        return {
            "loss": loss.item(),
            **{name: mean.item() for name, mean in metrics.items()},
            "grad_norm": grad_norm.item(),
            "lr": lr,
        }

    def _divide_gradients(self, count: Tensor) -> None:
        """Gradients of sums over all ranks become those of the mean."""
        parallel.add_gradients(self.parameters)
        for parameter in self.parameters:
            if not parameter.requires_grad:
                parameter.grad = None  # split weights get one also while they are fixed
            if parameter.grad is not None:
                parallel.here(parameter.grad).div_(count)

    def skip(self) -> dict[str, float]:
        """Let a step pass whose gradient was not finite; the learning rate stays a function of the step."""
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step")
            self.schedule.step()
        return {"loss": math.nan, "grad_norm": math.nan, "lr": lr}

    def named(self) -> dict[str, Tensor]:
        """The weights that train, by name."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {names[id(parameter)]: parameter for parameter in self.parameters}

    def state_dict(self) -> State:
        """The weights that train, in their own precision; AdamW's means by weight; learning rates and their step.

        All ranks ask at once, and the first one gets what is split.
        """
        weights = {name: parallel.gathered(weight) for name, weight in self.named().items()}
        moments = {name: self.optimizer.state.get(weight, {}) for name, weight in self.named().items()}
        moments = {name: {key: parallel.gathered(one) for key, one in some.items()} for name, some in moments.items()}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {"weights": weights, "optimizer": moments, "lr": rates, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Go on as the learner that gave `state`. ValueError where that one had other weights."""
        copy_weights(self.named(), state["weights"])
        for name, weight in self.named().items():
            moments = state["optimizer"].get(name, {})
            here = {key: value.to(weight.device) for key, value in moments.items()}
            # AdamW counts its steps in a tensor without dimensions, which is whole everywhere.
            self.optimizer.state[weight] = {
                key: parallel.split_as(value, weight) if value.ndim else value for key, value in here.items()
            }
        for group, lr in zip(self.optimizer.param_groups, state["lr"], strict=True):
            group["lr"] = lr
        self.schedule.load_state_dict(dict(state["schedule"]))

    def _clip(self) -> Tensor:
        """Clip the gradient of each network; the norm of the whole before that."""
        networks: dict[int, list[Tensor]] = {}
        for group in self.optimizer.param_groups:
            networks.setdefault(group.get("network", 0), []).extend(group["params"])
        limit = self.max_grad_norm or math.inf
        norms = [parallel.together(torch.nn.utils.clip_grad_norm_(some, limit)) for some in networks.values()]
        return torch.stack([norm.to(norms[0].device) for norm in norms]).norm()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[Mean, Metrics]:
        """Loss and metrics over some batches, the weights as they are."""
        total: tuple[Mean, Metrics] | None = None
        for batch in batches:
            micro_batches = self._micro_batches(batch)
            outputs = [self.objective.outputs(self.model, micro) for micro, _ in micro_batches]
            if self.objective.across:
                outputs = [join(self._everyones(outputs, micro_batches))]
                micro_batches = [(move(batch, self.model.device), parallel.is_first())]
            for output, (micro, counts) in zip(outputs, micro_batches, strict=True):
                total = _add(total, _counted(*self.objective.loss(output, micro), counts))
        assert total is not None, "nothing to evaluate"
        return parallel.add_means(*total)

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        """This rank's part of a batch in micro-batches, and whether they count; see `parallel.own_pieces`."""
        pieces = parallel.own_pieces(batch.item_rows().tolist(), self.micro_batch_rows)
        return [(move(batch.select(items), self.model.device), counts) for items, counts in pieces]

    def _accumulate(self, batch: Batch) -> tuple[Mean, Metrics]:
        """Add the gradient of the summed loss to the parameters."""
        micro_batches = self._micro_batches(batch)
        in_two_passes = self.objective.across and (len(micro_batches) > 1 or parallel.ranks() > 1)
        parts = self._across(batch, micro_batches) if in_two_passes else self._one_by_one(micro_batches)
        result: tuple[Mean, Metrics] | None = None
        for total, figures in parts:
            total.backward()
            result = _add(result, figures)
        assert result is not None, "an empty batch has no gradient"
        return parallel.add_means(*result)

    def _one_by_one(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Part]:
        for micro, counts in micro_batches:
            loss, metrics = self.objective.loss(self.objective.outputs(self.model, micro), micro)
            yield loss.total if counts else loss.total * 0, _counted(loss, metrics, counts)

    def _across(self, batch: Batch, micro_batches: Sequence[MicroBatch]) -> Iterator[Part]:
        whole = move(batch, self.model.device)
        with torch.no_grad():
            cached = [self.objective.outputs(self.model, micro) for micro, _ in micro_batches]
        by_rank = self._everyones(cached, micro_batches)
        joined = join(by_rank)
        leaves = [leaf.requires_grad_(leaf.is_floating_point()) for leaf in tensors_of(joined)]
        loss, metrics = self.objective.loss(joined, whole)
        gradients = gradients_of(loss.total, leaves)
        figures = _counted(loss, metrics, parallel.is_first())
        before = [tensors_of(outputs) for outputs in by_rank[: parallel.rank()]]
        start = [sum(map(len, tensors)) for tensors in zip(*before, strict=True)] or [0] * len(leaves)
        for i, (micro, counts) in enumerate(micro_batches):
            surrogate = torch.zeros((), device=self.model.device)
            for k, output in enumerate(tensors_of(self.objective.outputs(self.model, micro))):
                gradient = gradients[k]
                if gradient is not None and output.requires_grad:
                    own = gradient[start[k] : start[k] + len(output)] if counts else torch.zeros_like(output)
                    surrogate = surrogate + (output * own).sum()
                start[k] += len(output)
            yield surrogate, figures if i == 0 else None

    def _everyones(self, outputs: Sequence[Any], micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """The outputs of all ranks' micro-batches, one of each rank, without their graph."""
        counted = [given for given, (_, counts) in zip(outputs, micro_batches, strict=True) if counts]
        own = join(counted) if counted else none_of(outputs[0])
        if parallel.ranks() == 1:
            return [own]
        return [move(given, self.model.device) for given in parallel.gather(move(own, "cpu"))]


def gradients_of(total: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of `total` with respect to each leaf; None for those that have none."""
    floating = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(total, floating, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of a (nested) dataclass, in the order of its fields."""
    found: list[Tensor] = []
    for entry in fields(outputs):
        value = getattr(outputs, entry.name)
        found += tensors_of(value) if is_dataclass(value) else [value]
    return found


def join(parts: Sequence[Any]) -> Any:
    """The outputs of consecutive micro-batches, one number a row or an item, as the outputs of the whole batch."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    return type(first)(**{e.name: join([getattr(part, e.name) for part in parts]) for e in fields(first)})


def none_of(outputs: Any) -> Any:
    """Outputs of the same kind, of no rows."""
    if isinstance(outputs, Tensor):
        return outputs[:0]
    return type(outputs)(**{entry.name: none_of(getattr(outputs, entry.name)) for entry in fields(outputs)})


def _counted(loss: Mean, metrics: Metrics, counts: bool) -> tuple[Mean, Metrics]:
    """Figures without their graph; nothing but their names where they do not count."""
    figures = {name: mean.detach() for name, mean in metrics.items()}
    if counts:
        return loss.detach(), figures
    return _nothing(loss), {name: _nothing(mean) for name, mean in figures.items()}


def _nothing(mean: Mean) -> Mean:
    return Mean(torch.zeros_like(mean.total), torch.zeros_like(mean.count))


def _add(left: tuple[Mean, Metrics] | None, right: tuple[Mean, Metrics] | None) -> tuple[Mean, Metrics] | None:
    if left is None or right is None:
        return left or right
    return left[0] + right[0], {name: mean + right[1][name] for name, mean in left[1].items()}


def _check_finite(**figures: float) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value}: the weights were not changed by this step. "
                "Try a smaller --lr, --max-grad-norm 1, or --dtype float32."
            )


def make_optimizer(
    parameters: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    others: Sequence[tuple[Sequence[Tensor], float]] = (),
) -> torch.optim.Optimizer:
    """AdamW; weight decay leaves one-dimensional parameters (norms, biases) alone.

    `others` are the weights of further networks (a critic), each with its own learning rate.
    """
    groups = []
    for network, (weights, rate) in enumerate([(parameters, lr), *others]):
        matrices = [p for p in weights if p.ndim > 1]
        vectors = [p for p in weights if p.ndim <= 1]
        groups.append({"params": matrices, "lr": rate, "weight_decay": weight_decay, "network": network})
        groups.append({"params": vectors, "lr": rate, "weight_decay": 0.0, "network": network})
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, *, kind: str, warmup_steps: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then `constant`, `linear` (to 0 at `steps`) or `cosine` (to 0 at `steps`)."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
