"""`--loss` and `--loss-args`: sums, who gets which argument, conversion, and what people are told."""

import math
from typing import Literal

import pytest
import torch

from trimtab.batches import Pairs
from trimtab.losses.arguments import check_arguments, combine, describe, parse_arguments, parse_loss, reads
from trimtab.losses.preference import ALL_LOSSES, PREFERENCE_LOSSES, LengthSplitPairs, WeightedPairs, dpo, ipo, rpo
from trimtab.losses.reward import RANKING_LOSSES, REWARD_LOSSES, PairScores
from trimtab.losses.unpaired import UNPAIRED_LOSSES, Unpaired


def make_pairs() -> Pairs:
    columns = torch.tensor([[-9.0, -12.0, -10.0, -11.0, 4.0, 6.0], [-7.0, -6.0, -6.5, -6.0, 3.0, 2.0]]).unbind(1)
    return Pairs(*columns)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dpo", [(1.0, "dpo")]),
        ("dpo+0.2*preferred_ft", [(1.0, "dpo"), (0.2, "preferred_ft")]),
        (" 2 * dpo + preferred_ft ", [(2.0, "dpo"), (1.0, "preferred_ft")]),
        ("1e-3*dpo+1e+2*ipo+.5*nca", [(1e-3, "dpo"), (100.0, "ipo"), (0.5, "nca")]),
    ],
)
def test_sums(text, expected):
    assert parse_loss(text) == expected


@pytest.mark.parametrize(
    "text", ["", "+", "dpo+", "+dpo", "0.2*", "*dpo", "0.2 dpo", "dpo*0.2", "2*3*dpo", "dpo-ipo", "dpo,ipo", "a b"]
)
def test_what_is_not_a_sum(text):
    with pytest.raises(ValueError, match=r"loss .*"):
        parse_loss(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0*dpo", r"weight of dpo in loss '0\*dpo' must be above 0"),
        ("dpo+-1*ipo", "weight of ipo .* must be above 0"),
        ("nan*dpo", "weight of dpo .* must be a finite number"),
        ("x*dpo", "weight of dpo .* must be a finite number, given 'x'"),
        ("dpo+2*dpo", "names dpo twice"),
    ],
)
def test_weights_and_repetitions_that_make_no_sense(text, message):
    with pytest.raises(ValueError, match=message):
        parse_loss(text)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_every_name_is_a_loss_of_its_own_and_its_type_is_known(name):
    loss = combine(ALL_LOSSES, name)
    assert loss.names == (name,)
    assert loss.reads is {"ld_dpo": LengthSplitPairs, "wpo": WeightedPairs}.get(name, Pairs)
    assert str(loss) == describe(ALL_LOSSES[name])


def test_what_losses_read():
    assert {reads(loss) for loss in UNPAIRED_LOSSES.values()} == {Unpaired}
    assert {reads(loss) for loss in REWARD_LOSSES.values()} == {PairScores}


def test_a_sum_is_the_weighted_sum_of_its_losses():
    p = make_pairs()
    loss = combine(PREFERENCE_LOSSES, "dpo+0.2*ipo+3*rpo", ["beta=0.5", "ipo.tau=0.4", "rpo.beta=0.9"])
    expected = dpo(p, beta=0.5) + 0.2 * ipo(p, tau=0.4) + 3 * rpo(p, beta=0.9)
    torch.testing.assert_close(loss(p), expected)
    assert loss.names == ("dpo", "ipo", "rpo")
    assert str(loss) == (
        "dpo(beta=0.5, label_smoothing=0.0) + 0.2 * ipo(tau=0.4, average=True) + 3 * rpo(beta=0.9, alpha=1.0)"
    )


def test_losses_of_two_inputs_combine_too():
    scores, sizes = torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.tensor([2, 2])
    loss = combine(RANKING_LOSSES, "grouped+choice")
    torch.testing.assert_close(loss(scores, sizes), torch.tensor([2 * math.log(1 + math.exp(-1)), 2 * math.log(2)]))


def test_losses_of_different_inputs_cannot_be_added():
    with pytest.raises(ValueError, match=r"dpo and wpo cannot be added.*\(Pairs and WeightedPairs\)"):
        combine(ALL_LOSSES, "dpo+wpo")


def test_unknown_loss_names_the_closest_and_lists_all():
    with pytest.raises(ValueError, match=r"unknown loss 'simp'\. Did you mean simpo\?") as caught:
        combine(PREFERENCE_LOSSES, "dpo+simp")
    assert all(name in str(caught.value) for name in PREFERENCE_LOSSES)
    with pytest.raises(ValueError, match=r"unknown loss 'zzzz'\. The losses are alphapo, aot, "):
        combine(PREFERENCE_LOSSES, "zzzz")


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        ("dpo", ["bta=1"], r"unknown argument 'bta'\. Did you mean beta\?.*dpo\(beta=0\.1, label_smoothing=0\.0\)"),
        ("dpo", ["tau=1"], r"unknown argument 'tau'.*dpo\(beta=0\.1"),
        ("dpo+ipo", ["gamma=1"], r"unknown argument 'gamma'.*dpo\(.*ipo\(tau=0\.1, average=True\)"),
        ("dpo+ipo", ["ipo.beta=1"], r"unknown argument 'ipo\.beta'"),
        ("dpo+ipo", ["nca.beta=1"], r"unknown argument 'nca\.beta'"),
        ("dpo", ["beta"], r"'beta' is not of the form name=value"),
        ("dpo", ["beta="], r"not of the form name=value"),
        ("dpo", ["=1"], r"not of the form name=value"),
        ("dpo", ["beta=1", "beta=2"], "beta is given twice: 1 and 2"),
        ("dpo", ["beta=high"], "beta must be a finite number, given 'high'"),
        ("dpo", ["beta=nan"], "beta must be a finite number"),
        ("chi_po", ["r_max=inf"], "r_max must be a finite number"),
        ("dpo", ["beta=0"], "beta must be above 0, given 0"),
        ("dpo", ["label_smoothing=0.5"], r"label_smoothing must be in \[0, 0\.5\), given 0\.5"),
        ("exo", ["label_smoothing=0"], r"label_smoothing must be in \(0, 0\.5\)"),
        ("dpop", ["lam=-1"], "lam must be at least 0"),
        ("unlikelihood", ["alpha=1.5"], r"alpha must be in \[0, 1\]"),
        ("ipo", ["average=maybe"], "average must be true or false, given 'maybe'"),
        ("f_dpo", ["divergence=tv"], "divergence must be one of reverse_kl, forward_kl, js, alpha, given 'tv'"),
    ],
)
def test_wrong_arguments_are_refused_by_name(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        combine(PREFERENCE_LOSSES, loss, arguments)


def test_a_bare_argument_goes_to_every_loss_that_has_it_and_a_prefix_wins():
    loss = combine(PREFERENCE_LOSSES, "dpo+hinge+ipo", ["beta=0.3", "hinge.beta=0.7"])
    assert [dict(term.arguments) for term in loss.terms] == [{"beta": 0.3}, {"beta": 0.7}, {}]


def test_conversion_follows_the_annotations():
    def loss(p, *, rate: float = 1.0, steps: int = 2, on: bool = False, kind: Literal["a", "b"] = "a", note: str = ""):
        del p, rate, steps, on, kind, note

    texts = parse_arguments(["rate=1e-2", "steps=-3", "on=TRUE", "kind=b", "note=x=y"])
    expected = {"rate": 0.01, "steps": -3, "on": True, "kind": "b", "note": "x=y"}
    assert check_arguments(loss, texts) == expected
    assert check_arguments(loss, expected) == expected
    assert isinstance(check_arguments(loss, {"rate": 3})["rate"], float)
    for wrong in ({"steps": "2.5"}, {"steps": True}, {"rate": True}, {"note": 3}, {"kind": "c"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            check_arguments(loss, wrong)
    assert describe(loss) == "loss(rate=1.0, steps=2, on=False, kind='a', note='')"
