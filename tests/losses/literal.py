"""Formulas written out once more for one pair, with `math` and plain floats, as the papers print them."""

import math


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def neg_log_sigmoid(x: float) -> float:
    return math.log(1 + math.exp(-x))


def dpo(pw, pl, fw, fl, nw, nl, *, beta=0.1, label_smoothing=0.0):
    x = beta * ((pw - fw) - (pl - fl))
    return (1 - label_smoothing) * neg_log_sigmoid(x) + label_smoothing * neg_log_sigmoid(-x)


def robust(pw, pl, fw, fl, nw, nl, *, beta=0.1, label_smoothing=0.1):
    x, e = beta * ((pw - fw) - (pl - fl)), label_smoothing
    return ((1 - e) * neg_log_sigmoid(x) - e * neg_log_sigmoid(-x)) / (1 - 2 * e)


def ipo(pw, pl, fw, fl, nw, nl, *, tau=0.1, average=True):
    margin = (pw - fw) / nw - (pl - fl) / nl if average else (pw - fw) - (pl - fl)
    return (margin - 1 / (2 * tau)) ** 2


def hinge(pw, pl, fw, fl, nw, nl, *, beta=0.05):
    return max(0, 1 - beta * ((pw - fw) - (pl - fl)))


def slic(pw, pl, fw, fl, nw, nl, *, delta=1.0, lam=0.1):
    return max(0, delta - pw + pl) - lam * pw


def simpo(pw, pl, fw, fl, nw, nl, *, beta=2.0, gamma=1.0):
    return neg_log_sigmoid(beta * (pw / nw - pl / nl) - gamma)


def orpo(pw, pl, fw, fl, nw, nl, *, lam=0.1):
    odds_w = math.exp(pw / nw) / (1 - math.exp(pw / nw))
    odds_l = math.exp(pl / nl) / (1 - math.exp(pl / nl))
    return -pw / nw + lam * neg_log_sigmoid(math.log(odds_w / odds_l))


def cpo(pw, pl, fw, fl, nw, nl, *, beta=0.1, alpha=1.0, average=True):
    return neg_log_sigmoid(beta * (pw - pl)) + alpha * -(pw / nw if average else pw)


def alphapo(pw, pl, fw, fl, nw, nl, *, alpha=0.25, beta=2.5, gamma=0.1):
    def reward(mean):
        return (1 - math.exp(mean) ** -alpha) / alpha if alpha else mean

    return neg_log_sigmoid(beta * (reward(pw / nw) - reward(pl / nl)) - gamma)


def length_normalized_dpo(pw, pl, fw, fl, nw, nl, *, beta=5.0):
    return neg_log_sigmoid(beta * ((pw - fw) / nw - (pl - fl) / nl))


def r_dpo(pw, pl, fw, fl, nw, nl, *, beta=0.1, alpha=0.05):
    return neg_log_sigmoid(beta * ((pw - fw) - (pl - fl)) + alpha * (nw - nl))


def dpop(pw, pl, fw, fl, nw, nl, *, beta=0.3, lam=50.0):
    return neg_log_sigmoid(beta * ((pw - fw) - (pl - fl) - lam * max(0, fw - pw)))


def rpo(pw, pl, fw, fl, nw, nl, *, beta=0.1, alpha=1.0):
    return neg_log_sigmoid(beta * ((pw - fw) - (pl - fl))) - alpha * pw / nw


def exo(pw, pl, fw, fl, nw, nl, *, beta=0.1, label_smoothing=1e-3):
    x, e = beta * ((pw - fw) - (pl - fl)), label_smoothing
    return sum(q * math.log(q / p) for q, p in ((sigmoid(x), 1 - e), (sigmoid(-x), e)))


def nca(pw, pl, fw, fl, nw, nl, *, beta=0.01):
    rw, rl = beta * (pw - fw), beta * (pl - fl)
    return neg_log_sigmoid(rw) + 0.5 * neg_log_sigmoid(-rw) + 0.5 * neg_log_sigmoid(-rl)


def bco_pair(pw, pl, fw, fl, nw, nl, *, beta=0.01, delta=0.0):
    return neg_log_sigmoid(beta * (pw - fw) - delta) + neg_log_sigmoid(-(beta * (pl - fl) - delta))


def apo_zero(pw, pl, fw, fl, nw, nl, *, beta=0.1):
    return 1 - sigmoid(beta * (pw - fw)) + sigmoid(beta * (pl - fl))


def apo_down(pw, pl, fw, fl, nw, nl, *, beta=0.1):
    rw, rl = beta * (pw - fw), beta * (pl - fl)
    return sigmoid(rw) + 1 - sigmoid(rw - rl)


def discopop(pw, pl, fw, fl, nw, nl, *, beta=0.05, tau=0.05):
    rho = beta * ((pw - fw) - (pl - fl))
    return (1 - sigmoid(rho / tau)) * neg_log_sigmoid(rho) + sigmoid(rho / tau) * math.exp(-rho)


def sppo(pw, pl, fw, fl, nw, nl, *, eta=1000.0):
    return sum((ratio - eta * (win - 0.5)) ** 2 for ratio, win in ((pw - fw, 1), (pl - fl, 0)))


def f_dpo(pw, pl, fw, fl, nw, nl, *, beta=0.1, divergence="reverse_kl", alpha=0.5):
    slope = {
        "reverse_kl": lambda t: math.log(t) + 1,
        "forward_kl": lambda t: -1 / t,
        "js": lambda t: math.log(2 * t / (1 + t)),
        "alpha": lambda t: (t ** (alpha - 1) - 1) / (alpha - 1) if alpha < 1 else math.log(t),
    }[divergence]
    return neg_log_sigmoid(beta * (slope(math.exp(pw - fw)) - slope(math.exp(pl - fl))))


def chi_po(pw, pl, fw, fl, nw, nl, *, beta=0.05, r_max=math.inf):
    def phi(t):
        return t + math.log(t)

    difference = beta * phi(math.exp(pw - fw)) - beta * phi(math.exp(pl - fl))
    return neg_log_sigmoid(max(-2 * r_max, min(2 * r_max, difference)))


def unlikelihood(pw, pl, fw, fl, nw, nl, *, alpha=0.1):
    return -(pw - alpha * pl)


def preferred_ft(pw, pl, fw, fl, nw, nl, *, average=False):
    return -pw / nw if average else -pw


def aot(rows, *, beta=0.01):
    """All pairs at once: each pair's policy margin against the reference margin of the same rank."""
    margins = [pw - pl for pw, pl, *_ in rows]
    references = sorted(fw - fl for _, _, fw, fl, *_ in rows)
    return [neg_log_sigmoid(beta * (u - references[sum(v < u for v in margins)])) for u in margins]


def aot_unpaired(rows, *, beta=0.01):
    chosen = [pw - fw for pw, _, fw, *_ in rows]
    rejected = sorted(pl - fl for _, pl, _, fl, *_ in rows)
    return [neg_log_sigmoid(beta * (u - rejected[sum(v < u for v in chosen)])) for u in chosen]


def kto(p, f, q, g, wanted, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, z0=None):
    """Lists of floats; `z0` given freezes it, as a gradient that does not pass through it sees it."""
    z0 = max(0, sum(a - b for a, b in zip(q, g, strict=True)) / len(q)) if z0 is None else z0
    return [
        desirable_weight * (1 - sigmoid(beta * (a - b - z0)))
        if good
        else undesirable_weight * (1 - sigmoid(beta * (z0 - (a - b))))
        for a, b, good in zip(p, f, wanted, strict=True)
    ]


def bco(p, f, q, g, wanted, *, beta=0.01, delta=None):
    rewards = [beta * (a - b) for a, b in zip(p, f, strict=True)]
    delta = sum(rewards) / len(rewards) if delta is None else delta
    return [neg_log_sigmoid(r - delta if good else delta - r) for r, good in zip(rewards, wanted, strict=True)]


def bradley_terry(pw, pl, c, m, *, label_smoothing=0.0, centring=0.0, margin_scale=1.0):
    smoothed = c * (1 - label_smoothing) + (1 - c) * label_smoothing
    win = sigmoid(pw - pl - margin_scale * m)
    return -smoothed * math.log(win) - (1 - smoothed) * math.log(1 - win) + centring * (pw + pl) ** 2


def ties(pw, pl, c, m, *, theta=2.0, centring=0.0, margin_scale=1.0):
    a, b = math.exp(pw - margin_scale * m), math.exp(pl)
    win, loss = a / (a + theta * b), b / (b + theta * a)
    tie = (theta**2 - 1) * a * b / ((a + theta * b) * (b + theta * a))
    shares = {win: max(0, 2 * c - 1), loss: max(0, 1 - 2 * c), tie: 1 - abs(2 * c - 1)}
    return -sum(share * math.log(p) for p, share in shares.items()) + centring * (pw + pl) ** 2


def reward_hinge(pw, pl, c, m, *, delta=1.0, margin_scale=1.0):
    d = pw - pl - margin_scale * m
    return c * max(0, delta - d) + (1 - c) * max(0, delta + d)


def grouped(scores):
    pairs = [(i, j) for i in range(len(scores)) for j in range(i + 1, len(scores))]
    return sum(neg_log_sigmoid(scores[i] - scores[j]) for i, j in pairs) / math.comb(len(scores), 2)


def plackett_luce(scores):
    exps = [math.exp(score) for score in scores]
    return -math.log(math.prod(exps[k] / sum(exps[k:]) for k in range(len(exps))))


def choice(scores):
    return -math.log(math.exp(scores[0]) / sum(math.exp(score) for score in scores))


def derivative(function, arguments, index, step=1e-3):
    """d function / d arguments[index], by a five-point difference (error about step^4)."""

    def at(shift):
        moved = list(arguments)
        moved[index] += shift * step
        return function(moved)

    return (at(-2) - 8 * at(-1) + 8 * at(1) - at(2)) / (12 * step)


def policy_reinforce(logprob, old, advantage):
    return -advantage * logprob


def policy_ppo_clip(logprob, old, advantage, *, epsilon=0.2, epsilon_high=None, dual_clip=math.inf):
    high = epsilon if epsilon_high is None else epsilon_high
    return pessimistic(math.exp(logprob - old), advantage, epsilon, high, dual_clip)


def pessimistic(ratio, advantage, low, high, dual_clip=math.inf):
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return -(max(objective, dual_clip * advantage) if advantage < 0 and dual_clip < math.inf else objective)


def policy_gspo(logprobs, olds, advantage, *, epsilon=3e-4, epsilon_high=4e-4):
    """The loss of a whole answer, which is the same at each of its tokens."""
    ratio = math.exp(sum(p - q for p, q in zip(logprobs, olds, strict=True)) / len(logprobs))
    return pessimistic(ratio, advantage, epsilon, epsilon_high)


def policy_cispo(logprob, old, advantage, *, max_ratio=5.0, frozen=None):
    weight = math.exp((logprob if frozen is None else frozen) - old)
    return -min(weight, max_ratio) * advantage * logprob


def value_squared_error(value, old, came):
    return (value - came) ** 2 / 2


def value_clipped(value, old, came, *, epsilon=0.2):
    held = min(max(value, old - epsilon), old + epsilon)
    return max((value - came) ** 2, (held - came) ** 2) / 2
