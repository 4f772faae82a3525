"""From `--loss` and `--loss-args` to one callable, checked by name and range before anything is loaded.

A loss is a registry entry or a weighted sum of entries, `dpo+0.2*preferred_ft`. An argument is `name=value`, for every
loss of the sum that has it, or `loss.name=value` for one of them. Names, types, ranges and defaults are those of the
functions' keyword-only parameters.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """The values that a hyperparameter may take; both ends are excluded unless they are included by name."""

    low: float
    high: float = math.inf
    low_included: bool = False
    high_included: bool = False

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.low_included else value > self.low
        below = value <= self.high if self.high_included else value < self.high
        return above and below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'at least' if self.low_included else 'above'} {self.low:g}"
        return f"in {'[' if self.low_included else '('}{self.low:g}, {self.high:g}{']' if self.high_included else ')'}"

    def check(self, name: str, value: float) -> None:
        """Raise ValueError unless `value` is inside."""
        if value not in self:
            raise ValueError(f"{name} must be {self}, given {value:g}")


Positive = Annotated[float, Range(0)]
NonNegative = Annotated[float, Range(0, low_included=True)]
Fraction = Annotated[float, Range(0, 1, low_included=True, high_included=True)]
FLIPS = Range(0, 0.5, low_included=True)
FlipRate = Annotated[float, FLIPS]
"""The share of labels that are taken to be wrong."""


@dataclass(frozen=True)
class Term:
    """One loss of a sum, with the arguments that were given for it."""

    weight: float
    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Every hyperparameter, given or default."""
        return {**defaults(self.function), **self.arguments}

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{'' if self.weight == 1 else f'{self.weight:g} * '}{self.name}({settings})"


@dataclass(frozen=True)
class CombinedLoss:
    """A weighted sum of losses that read the same input: a callable like each of them."""

    terms: tuple[Term, ...]

    def __call__(self, *inputs: Any) -> Any:
        values = [term.weight * term.function(*inputs, **term.arguments) for term in self.terms]
        return sum(values[1:], start=values[0])

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))

    @property
    def names(self) -> tuple[str, ...]:
        """The registry names in the sum, in the order they were given."""
        return tuple(term.name for term in self.terms)

    @property
    def reads(self) -> Any:
        """The type of the input, such as `Pairs`; one for all terms."""
        return reads(self.terms[0].function)


def combine(registry: Mapping[str, Callable[..., Any]], text: str, arguments: Iterable[str] = ()) -> CombinedLoss:
    """The loss that `text` and `arguments` (`name=value` or `loss.name=value`) ask for.

    Raises ValueError, saying what is allowed, for an unknown loss, losses that cannot be added because they read
    different inputs, and an argument that is unknown, of the wrong type or out of range.
    """
    terms = parse_loss(text)
    for _, name in terms:
        check_name(name, registry)
    functions = {name: registry[name] for _, name in terms}
    check_same_input(functions)
    given = assign(parse_arguments(arguments), functions)
    return CombinedLoss(
        tuple(
            Term(weight, name, functions[name], check_arguments(functions[name], given[name])) for weight, name in terms
        )
    )


def parse_loss(text: str) -> list[tuple[float, str]]:
    """The weights and names of `dpo+0.2*preferred_ft`. ValueError for anything that is not such a sum."""
    terms = [parse_term(part.strip(), text) for part in re.split(r"(?<![0-9.][eE])\+", text)]
    names = [name for _, name in terms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"loss {text!r} names {name} twice; give it one weight")
    return terms


def parse_term(part: str, text: str) -> tuple[float, str]:
    """One term of the sum `text`: `name` or `weight*name`."""
    match = re.fullmatch(r"(?:([^*]+?)\s*\*\s*)?([A-Za-z_]\w*)", part)
    if match is None:
        raise ValueError(f"loss {text!r} is not a name or a weighted sum of names such as dpo+0.2*preferred_ft")
    weight = 1.0 if match[1] is None else to_float(match[1], f"the weight of {match[2]} in loss {text!r}")
    if weight <= 0:
        raise ValueError(f"the weight of {match[2]} in loss {text!r} must be above 0, given {match[1]}")
    return weight, match[2]


def check_name(name: str, registry: Mapping[str, Any], *, kind: str = "loss") -> None:
    """ValueError with the closest match and the whole list unless the registry has the name."""
    if name not in registry:
        close = difflib.get_close_matches(name, registry, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        plural = "losses" if kind == "loss" else f"{kind}s"
        raise ValueError(f"unknown {kind} {name!r}.{hint} The {plural} are {', '.join(sorted(registry))}")


def check_same_input(functions: Mapping[str, Callable[..., Any]]) -> None:
    """ValueError if the losses of a sum read different inputs."""
    inputs = {name: reads(function) for name, function in functions.items()}
    first, *others = inputs
    for other in others:
        if inputs[other] is not inputs[first]:
            kinds = " and ".join(getattr(inputs[name], "__name__", str(inputs[name])) for name in (first, other))
            raise ValueError(f"{first} and {other} cannot be added: they read different inputs ({kinds})")


def parse_arguments(texts: Iterable[str]) -> dict[str, str]:
    """The names and values of `name=value` texts. ValueError for another form and for a name given twice."""
    given: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise ValueError(f"argument {text!r} is not of the form name=value, such as beta=0.1")
        if name in given:
            raise ValueError(f"argument {name} is given twice: {given[name]} and {value}")
        given[name] = value
    return given


def assign(given: Mapping[str, str], functions: Mapping[str, Callable[..., Any]]) -> dict[str, dict[str, str]]:
    """Which arguments each loss of a sum gets; `loss.name` wins over a bare `name`."""
    for key in given:
        owner, _, name = key.rpartition(".")
        owners = [owner] if owner in functions else [] if owner else list(functions)
        if not any(name in defaults(functions[loss]) for loss in owners):
            raise ValueError(unknown_argument(key, functions))
    return {
        loss: {
            name: given.get(f"{loss}.{name}") or given[name]
            for name in defaults(function)
            if name in given or f"{loss}.{name}" in given
        }
        for loss, function in functions.items()
    }


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for `function`, converted to the types of its keyword-only parameters.

    Raises ValueError for a name that it lacks, a value of another type, a number that is not finite or out of range.
    """
    hints = get_type_hints(function, include_extras=True)
    allowed = defaults(function)
    for name in arguments:
        if name not in allowed:
            raise ValueError(unknown_argument(name, {function.__name__: function}))
    return {name: convert(value, hints[name], name) for name, value in arguments.items()}


def convert(value: Any, hint: Any, name: str) -> Any:
    """A value, as text or already a Python object, as the annotation wants it."""
    if type(None) in get_args(hint):
        (given,) = (kind for kind in get_args(hint) if kind is not type(None))
        return None if value in (None, "none") else convert(value, given, name)
    if get_origin(hint) is Annotated:
        inner, *limits = get_args(hint)
        value = convert(value, inner, name)
        for limit in limits:
            limit.check(name, value)
        return value
    if get_origin(hint) is Literal:
        return to_choice(value, get_args(hint), name)
    assert hint in CONVERSIONS, f"{name} has the annotation {hint}, which is none of {list(CONVERSIONS)}"
    return CONVERSIONS[hint](value, name)


def to_choice(value: Any, choices: tuple[Any, ...], name: str) -> Any:
    """One of the choices, which are compared as text."""
    for choice in choices:
        if str(value) == str(choice):
            return choice
    raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, given {value!r}")


def to_float(value: Any, name: str) -> float:
    """A finite number."""
    message = f"{name} must be a finite number, given {value!r}"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(message)
    try:
        number = float(value)
    except ValueError:
        raise ValueError(message) from None
    if not math.isfinite(number):
        raise ValueError(message)
    return number


def to_int(value: Any, name: str) -> int:
    """A whole number."""
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?\d+", str(value)):
        raise ValueError(f"{name} must be a whole number, given {value!r}")
    return int(value)


def to_bool(value: Any, name: str) -> bool:
    """`true` or `false`, in any case."""
    known = {"true": True, "false": False}
    if str(value).lower() not in known:
        raise ValueError(f"{name} must be true or false, given {value!r}")
    return known[str(value).lower()]


def to_str(value: Any, name: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, given {value!r}")
    return value


CONVERSIONS: dict[Any, Callable[[Any, str], Any]] = {float: to_float, int: to_int, bool: to_bool, str: to_str}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The hyperparameters of a loss, which are its keyword-only parameters, and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def describe(function: Callable[..., Any]) -> str:
    """A loss and its hyperparameters with their defaults: `dpo(beta=0.1, label_smoothing=0.0)`."""
    return f"{function.__name__}({', '.join(f'{name}={value!r}' for name, value in defaults(function).items())})"


def unknown_argument(name: str, functions: Mapping[str, Callable[..., Any]]) -> str:
    """What to say about an argument that none of the losses has."""
    known = sorted({argument for function in functions.values() for argument in defaults(function)})
    close = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    hint = f" Did you mean {close[0]}?" if close and close[0] != name else ""
    return f"unknown argument {name!r}.{hint} What there is: {'; '.join(map(describe, functions.values()))}"


def reads(function: Callable[..., Any]) -> Any:
    """The type of what a loss reads: the annotation of its first parameter."""
    first = next(iter(inspect.signature(function).parameters))
    return get_type_hints(function)[first]
