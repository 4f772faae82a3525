"""Sampling on a vLLM server that the user has started: the call of `sample`, answered over HTTP.

Written from vLLM's documentation and tested with a stand-in that speaks the same HTTP; not run on a real vLLM.
What it asks for, and where that is documented (docs.vllm.ai, versions 0.26 to 0.32, autumn of 2026):

- `GET /v1/models`: what is served, and how long rows may be (`max_model_len`).
- `POST /v1/completions` (OpenAI-compatible server): the ids of a prompt in, with `return_token_ids` the ids of the
  answers out; one request a prompt, so that each has its own seed.
- `POST /collective_rpc` with `reload_weights` (sleep mode; `weights_path`: layerwise reloading): the server reads new
  weights from a folder. It is a route of development mode, so the server needs `VLLM_SERVER_DEV_MODE=1`.

Weights go to the server whenever they have changed since the last call, and a new `cache_salt` with them keeps it from
continuing what it had read with the old ones. Its log-probabilities are those of the plain policy or of the
distribution it draws from, as it was started (`--logprobs-mode`): for plain sampling that is the same, otherwise the
second is needed. The server's numbers are then `sampled_logprobs`, and the policy itself computes `logprobs`.
"""

from __future__ import annotations

import http.client
import json
import math
import operator
import os
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from trimtab.batches import PerToken, Tokens
from trimtab.progress import progress_bar
from trimtab.records import Prompt
from trimtab.sampling.answers import Ending, PartialAnswer, Samples, blank_answers, check, collect
from trimtab.sampling.draws import Choice

if TYPE_CHECKING:
    from trimtab.models import Policy

SECONDS = 600.0
"""How long the server may take for one request; loading weights is one."""

START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --logprobs-mode processed_logprobs"

LEAST_TEMPERATURE = 0.01
"""vLLM raises a lower one to this, unless it is 0."""

Json = dict[str, Any]


class VllmServer:
    """A vLLM server as a sampler. ConnectionError, TimeoutError or ValueError say what is wrong and what to type.

    Whatever weights it was started with, it answers with those of the policy it is called with; it must have the same
    architecture and see the folder for temporary files (TMPDIR) under the same path. With VLLM_API_KEY in the
    environment, requests carry it.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model, self.max_length = self._served()
        self.pushed: list[float] = []
        self.salt = ""
        self.shows_sampled: bool | None = None

    def __call__(  # noqa: PLR0913 (the arguments of `sample`)
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        stop_ids: Collection[int] | None = None,
        seed: int = 0,
        step: int = 0,
        batch_rows: int = 32,
        progress: bool = False,
    ) -> Samples:
        """`n` answers to every prompt, as `sample` draws them but by the server's own random numbers.

        `batch_rows` is how many answers are asked for at the same time.
        """
        choice = Choice(temperature, top_k, top_p, min_p, repetition_penalty)
        check(prompts, n=n, max_new_tokens=max_new_tokens, batch_rows=batch_rows, step=step)
        check_choice(choice, n)
        ending = Ending.of(policy, stop, stop_ids)
        answers = blank_answers(policy, prompts, n, seed, step)
        self._check_lengths(answers, max_new_tokens)
        self._push(policy)
        if not (choice.is_plain or temperature == 0):
            self._check_mode(answers[0].prompt)
        settings = self._settings(choice, ending, n, max_new_tokens)
        groups = [answers[i : i + n] for i in range(0, len(answers), n)]
        bar = progress_bar("sample", len(answers)) if progress else nullcontext(lambda count: None)
        with bar as advance, workers(max(1, batch_rows // n)) as pool:
            replies = pool.map(lambda group: self._complete(group[0].prompt, group[0].key, settings), groups)
            for group, reply in zip(groups, replies, strict=True):
                self._fill(group, reply, settings, policy)
                advance(n)
        drawn = collect(policy, prompts, n, answers, ending)
        if choice.is_plain:
            return drawn
        sampled = torch.zeros_like(drawn.logprobs) if temperature == 0 else drawn.sampled_logprobs
        return replace(drawn, logprobs=plain_logprobs(policy, drawn.tokens, batch_rows), sampled_logprobs=sampled)

    # ---- What the server is told

    def _push(self, policy: Policy) -> None:
        """Send the weights if they are other ones than last time."""
        now = fingerprint(policy)
        if now == self.pushed:
            return
        with tempfile.TemporaryDirectory(prefix="trimtab-weights-") as folder:
            policy.save(folder, dtype=policy.arithmetic.autocast)
            self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self.pushed, self.salt = now, uuid.uuid4().hex

    def _settings(self, choice: Choice, ending: Ending, n: int, max_new_tokens: int) -> Json:
        """What every request of a call says."""
        return {
            **asdict(choice),
            "model": self.model,
            "n": n,
            "max_tokens": max_new_tokens,
            # Only these tokens end an answer, whatever the server's model says.
            "ignore_eos": True,
            "stop_token_ids": sorted(ending.ids),
            "stop": list(ending.texts),
            "logprobs": 1,
            "return_token_ids": True,
            "cache_salt": self.salt,
        }

    def _complete(self, prompt: Sequence[int], key: int, settings: Json) -> list[Json]:
        """The answers to one prompt, as the server tells them."""
        body = {**settings, "prompt": list(prompt), "seed": key % 2**63}
        choices = self._ask("/v1/completions", body).get("choices")
        if not isinstance(choices, list) or len(choices) != settings["n"]:
            found = len(choices) if isinstance(choices, list) else "no list of"
            told = f"{self._name} gave {found} answers to a prompt, {settings['n']} were asked for"
            raise ValueError(f"{told}. Is it a vLLM? Start one: {START}")
        return choices

    # ---- What it says

    def _served(self) -> tuple[str, int | None]:
        """The name of the model that is served, and the most tokens of a row."""
        served = self._ask("/v1/models").get("data")
        if not isinstance(served, list) or not served or not all(isinstance(model, dict) for model in served):
            raise ValueError(f"{self._name} serves no model. Start it: {START}")
        whole = [model for model in served if not model.get("parent")]  # adapters have a parent
        if len(whole) != 1 or not isinstance(whole[0].get("id"), str):
            raise ValueError(f"{self._name} serves {len(whole)} models; one is needed. Start it: {START}")
        longest = whole[0].get("max_model_len")
        return whole[0]["id"], longest if isinstance(longest, int) else None

    def _check_lengths(self, answers: Sequence[PartialAnswer], max_new_tokens: int) -> None:
        """ValueError for rows that the server would cut."""
        longest = max(len(answer.prompt) for answer in answers) + max_new_tokens
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"the longest prompt and {max_new_tokens} new tokens are {longest} tokens, and {self._name} takes "
                f"{self.max_length}: start it with --max-model-len {longest}, or lower --max-new-tokens"
            )

    def _check_mode(self, prompt: Sequence[int]) -> None:
        """ValueError if the server shows log-probabilities of the plain policy; asked once, with one token allowed."""
        if self.shows_sampled is None:
            settings = self._settings(Choice(), Ending(frozenset(), (), lambda ids: ""), 1, 1)
            [reply] = self._complete(prompt, 0, {**settings, "allowed_token_ids": [prompt[0]]})
            self.shows_sampled = self._read(reply, 1)[1][0] > -1e-6
        if not self.shows_sampled:
            raise ValueError(
                f"{self._name} gives the log-probabilities of the plain policy, not of the distribution that --top-k, "
                f"--top-p, --min-p, --repetition-penalty or --temperature makes of it. Start it: {START}"
            )

    def _fill(self, group: Sequence[PartialAnswer], replies: Sequence[Json], settings: Json, policy: Policy) -> None:
        """Put what the server said into the answers to one prompt."""
        words = policy.model.config.get_text_config().vocab_size
        most, stop_ids = settings["max_tokens"], set(settings["stop_token_ids"])
        for answer, reply in zip(group, replies, strict=True):
            ids, logprobs, finished = self._read(reply, most)
            if reply.get("prompt_token_ids") not in (None, answer.prompt):
                raise ValueError(f"{self._name} has read another prompt than it was given. Start it anew: {START}")
            if not 0 <= min(ids) <= max(ids) < words or stop_ids & set(ids[:-1]):
                raise ValueError(
                    f"{self._name} wrote tokens that the policy does not have, or went on after the end: it serves "
                    f"{self.model}, another model than the policy's. Start it with the policy's: {START}"
                )
            answer.ids, answer.logprobs, answer.sampled_logprobs, answer.finished = ids, logprobs, logprobs, finished

    def _read(self, reply: Json, most: int) -> tuple[list[int], list[float], bool]:
        """Ids, log-probabilities and whether it ended, of one answer. ValueError for anything but a whole answer."""
        try:
            ids = [operator.index(token) for token in reply["token_ids"]]
            logprobs = [float(value) for value in reply["logprobs"]["token_logprobs"]]
            why = reply["finish_reason"]
        except (KeyError, TypeError, ValueError):
            ids, logprobs, why = [], [], None
        if not ids or len(ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
            raise ValueError(
                f"{self._name} gave an answer without the ids and log-probabilities of its tokens, which a vLLM of "
                f"2026 gives: {json.dumps(reply)[:200]}"
            )
        if len(ids) > most or why not in ("stop", "length") or (why == "length" and len(ids) < most):
            raise ValueError(
                f"{self._name} gave {len(ids)} tokens and the reason {why!r}, {most} were asked for: start it with a "
                "larger --max-model-len, and let nobody else pause or abort its requests"
            )
        return ids, logprobs, why == "stop"

    # ---- HTTP

    @property
    def _name(self) -> str:
        return f"the server at {self.url}"

    def _ask(self, route: str, body: Json | None = None) -> Json:
        """The JSON of an answer: to a POST of `body`, or to a GET."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        # Not through a proxy: such a server is nobody's but one's own.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(self.url + route, data, headers), timeout=SECONDS) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(self._refusal(route, error.code, error.read())) from error
        except TimeoutError as error:
            raise TimeoutError(
                f"{self._name} did not answer {route} within {SECONDS:g} seconds: is it busy?"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", None) or error or type(error).__name__
            raise ConnectionError(f"{self._name} does not answer {route} ({why}). Start it: {START}") from error
        return self._parsed(route, text)

    def _parsed(self, route: str, text: bytes) -> Json:
        """An answer as JSON; an empty one is allowed, and means that it was done."""
        try:
            found = json.loads(text or b"{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{self._name} answers {route} with {text[:80]!r}, so it is no vLLM. Start one: {START}")
        return found

    def _refusal(self, route: str, status: int, text: bytes) -> str:
        """What an HTTP error means, and what to do."""
        advice = f"Start it: {START}"
        if status in (401, 403):
            advice = "Set VLLM_API_KEY to the key that it was started with."
        elif route == "/collective_rpc" and status != 404:
            advice = (
                "Does it serve a model of the policy's architecture, and does it see this machine's files? Else set "
                "TMPDIR to a folder that both see under the same path."
            )
        said = " ".join(text.decode(errors="replace").split())[:300]
        return f"{self._name} answers {route} with HTTP status {status}: {said or 'no reason given'}. {advice}"


def check_choice(choice: Choice, n: int) -> None:
    """ValueError for what vLLM refuses or would draw differently."""
    if choice.temperature == 0 and n > 1:
        raise ValueError(f"temperature 0 has one answer to a prompt and vLLM gives no more: {n} were asked for")
    if 0 < choice.temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature is {choice.temperature}: vLLM knows 0 and numbers from {LEAST_TEMPERATURE}. "
            "Give one of them, or --sampler own."
        )
    if choice.min_p and choice.top_p < 1:
        raise ValueError(
            f"min_p {choice.min_p} with top_p {choice.top_p}: vLLM applies min-p first, which keeps other tokens than "
            "top-p first. Give one of them, or --sampler own."
        )


@torch.no_grad()
def fingerprint(policy: Policy) -> list[float]:
    """Numbers that change with the weights. (torch's own count of changes knows nothing of fused optimizers.)"""
    weights = [weight for weight in policy.model.parameters() if weight.numel()]
    sums = [torch.stack([weight.sum(dtype=torch.float64), weight.norm(dtype=torch.float64)]) for weight in weights]
    return torch.cat(sums).tolist()


@contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that ask at the same time; after an error, those that have not begun do not."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@torch.no_grad()
def plain_logprobs(policy: Policy, tokens: Tokens, batch_rows: int) -> PerToken:
    """Log-probabilities under the policy at temperature 1, `batch_rows` rows at a time, in nats per token."""
    temperature, policy.module.temperature = policy.module.temperature, 1.0
    try:
        rows = torch.arange(len(tokens)).split(batch_rows)
        return torch.cat([policy.logprobs(tokens.select(some)).cpu() for some in rows])
    finally:
        policy.module.temperature = temperature
