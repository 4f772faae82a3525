"""The vLLM sampler, against a stand-in that speaks the same HTTP and samples with a tiny policy of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.builtin import tiny_policy
from trimtab.cli import main
from trimtab.models import Policy, load_policy
from trimtab.records import Prompt
from trimtab.sampling import VllmServer, sample, vllm
from trimtab.sampling.draws import Choice, draw, uniforms
from trimtab.tokens import decode

PROMPTS = [Prompt.from_text(text) for text in ("Once upon a time", "a", "A longer prompt than the others here is.")]
Reply = tuple[int, bytes]


class StandIn:
    """A server with the routes of vLLM that the sampler asks for; `faults` are given in place of true answers."""

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.processed = True
        self.reloads = True
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.models = [{"id": "start", "max_model_len": 200}]
        self.faults: dict[str, Callable[[Any], Reply]] = {}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def reply(self, route: str, body: dict[str, Any]) -> Reply:
        """What is answered, true or not."""
        self.asked.append((route, body))
        told = {"/v1/models": self.served, "/collective_rpc": self.reload, "/v1/completions": self.complete}[route]
        true = told(body)
        return self.faults[route](true) if route in self.faults else (200, json.dumps(true).encode())

    def served(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"object": "list", "data": self.models}

    def reload(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["method"] == "reload_weights"
        if self.reloads or self.policy is None:
            self.policy = load_policy(body["kwargs"]["weights_path"], dtype="float32", device="cpu")
        return {"results": [None]}

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["model"] == "start" and body["return_token_ids"] and body["ignore_eos"]
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        choice = Choice(**{name: body[name] for name in names})
        return {"choices": [self.answer(body, choice, number) for number in range(body["n"])]}

    def answer(self, body: dict[str, Any], choice: Choice, number: int) -> dict[str, Any]:
        policy, prompt, why = self.policy, body["prompt"], "length"
        assert policy is not None
        ids: list[int] = []
        logprobs: list[float] = []
        keys = np.array([body["seed"] + number], dtype=np.uint64)
        while why == "length" and len(ids) < body["max_tokens"]:
            rows = torch.tensor([prompt + ids])
            logits = policy.model(rows).logits[:, -1]
            seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, rows, True)
            allowed = torch.full_like(logits, float("-inf"))
            allowed[:, body.get("allowed_token_ids", slice(None))] = 0
            drawn = draw(logits + allowed, choice, uniforms(keys, len(ids)), seen)
            ids.append(int(drawn.ids))
            plain = logits.log_softmax(-1)[0, ids[-1]]
            logprobs.append(float(drawn.sampled_logprobs if self.processed else plain))
            ended = ids[-1] in body["stop_token_ids"] or any(t in decode(policy.tokenizer, ids) for t in body["stop"])
            why = "stop" if ended else "length"
        told = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "prompt_token_ids": prompt}
        return {"index": number, "text": "", "finish_reason": why, **told}

    def count(self, route: str) -> int:
        return sum(asked == route for asked, _ in self.asked)


def handler_of(server: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(*server.reply(self.path, {}))

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            server.keys.append(self.headers.get("Authorization"))
            self.send(*server.reply(self.path, json.loads(self.rfile.read(length))))

        def send(self, status: int, text: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the test's output stays clean."""

    return Handler


@pytest.fixture
def server() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.http.shutdown()
    stand_in.http.server_close()


@pytest.fixture
def policy() -> Policy:
    return tiny_policy(dtype="float32", device="cpu")


def change(policy: Policy) -> None:
    """A step that changes the weights, as an optimizer makes it."""
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2, fused=True)
    for parameter in policy.trainable_parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


# ---- The same answers


def test_most_probable_answers_are_those_of_the_own_sampler(server: StandIn, policy: Policy) -> None:
    settings = {"max_new_tokens": 8, "temperature": 0.0}
    theirs, ours = VllmServer(server.url)(policy, PROMPTS, **settings), sample(policy, PROMPTS, **settings)
    assert torch.equal(theirs.tokens.ids, ours.tokens.ids) and theirs.texts == ours.texts
    assert torch.equal(theirs.tokens.response_mask, ours.tokens.response_mask)
    assert torch.equal(theirs.finished, ours.finished)
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-5, rtol=0)
    assert not theirs.sampled_logprobs.any() and not ours.sampled_logprobs.any()


@pytest.mark.parametrize("processed", [True, False])
def test_plain_sampling_takes_the_numbers_of_either_mode(server: StandIn, policy: Policy, processed: bool) -> None:
    server.processed = processed
    drawn = VllmServer(server.url)(policy, PROMPTS, 3, max_new_tokens=6, seed=1)
    assert torch.equal(drawn.logprobs, drawn.sampled_logprobs) and drawn.n == 3 and len(drawn.texts) == 9
    with torch.no_grad():
        torch.testing.assert_close(drawn.logprobs, policy.logprobs(drawn.tokens), atol=1e-5, rtol=0)
    assert drawn.row_prompts[3] == PROMPTS[1] and len(set(drawn.texts)) > 6


def test_draws_depend_on_seed_and_step_and_not_on_how_many_are_asked_at_once(server: StandIn, policy: Policy) -> None:
    sampler = VllmServer(server.url)
    first = sampler(policy, PROMPTS, 2, max_new_tokens=6, seed=1, batch_rows=1)
    assert sampler(policy, PROMPTS, 2, max_new_tokens=6, seed=1, batch_rows=32).texts == first.texts
    for other in ({"seed": 2}, {"seed": 1, "step": 1}):
        assert sampler(policy, PROMPTS, 2, max_new_tokens=6, **other).texts != first.texts


SHAPED = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3}


def test_both_log_probabilities_of_a_shaped_distribution(server: StandIn, policy: Policy) -> None:
    policy.module.temperature = 0.7
    drawn = VllmServer(server.url)(policy, PROMPTS, 2, max_new_tokens=6, **SHAPED)
    assert policy.module.temperature == 0.7
    policy.module.temperature = 1.0
    mask = drawn.tokens.response_mask
    with torch.no_grad():
        torch.testing.assert_close(drawn.logprobs, policy.logprobs(drawn.tokens), atol=1e-5, rtol=0)
    assert (drawn.sampled_logprobs[mask] <= 0).all() and not drawn.sampled_logprobs[~mask].any()
    # Of 20 tokens at most, each is more probable than among 259, but for the penalty on what was seen.
    assert (drawn.sampled_logprobs > drawn.logprobs)[mask].float().mean() > 0.8
    # One request more than there are prompts: which log-probabilities does it show?
    assert server.count("/v1/completions") == len(PROMPTS) + 1


def test_a_server_that_shows_the_plain_policy_is_refused_for_a_shaped_distribution(
    server: StandIn, policy: Policy
) -> None:
    server.processed = False
    with pytest.raises(ValueError, match=r"plain policy, not of the distribution.*--logprobs-mode processed_logprobs"):
        VllmServer(server.url)(policy, PROMPTS, temperature=0.7)


def test_texts_and_tokens_end_answers(server: StandIn, policy: Policy) -> None:
    sampler = VllmServer(server.url)
    free = sampler(policy, PROMPTS[:1], max_new_tokens=12, stop_ids=())
    ids = free.tokens.ids[0][free.tokens.response_mask[0]].tolist()
    assert len(ids) == 12 and not free.finished.any()
    ended = sampler(policy, PROMPTS[:1], max_new_tokens=12, stop_ids=[ids[4]])
    length = ids.index(ids[4]) + 1
    assert ended.tokens.response_lengths.tolist() == [length] and ended.finished.all()
    letter = next(text for text in free.texts[0] if text.isascii())
    cut = sampler(policy, PROMPTS[:1], max_new_tokens=12, stop=[letter], stop_ids=())
    assert cut.finished.all() and cut.texts[0] == free.texts[0].split(letter)[0]


# ---- Weights


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_weights_are_sent_when_they_have_changed(server: StandIn, lora_rank: int) -> None:
    policy = tiny_policy(dtype="float32", device="cpu", lora_rank=lora_rank)
    sampler = VllmServer(server.url)
    pushes = []
    for changed in (False, False, True, False):
        if changed:
            change(policy)
        drawn = sampler(policy, PROMPTS, max_new_tokens=6)
        pushes.append(server.count("/collective_rpc"))
        with torch.no_grad():
            torch.testing.assert_close(drawn.logprobs, policy.logprobs(drawn.tokens), atol=1e-5, rtol=0)
    assert pushes == [1, 1, 2, 2]
    salts = [body["cache_salt"] for route, body in server.asked if route == "/v1/completions"]
    assert len(set(salts)) == 2 and "" not in salts and len(set(salts[:6])) == 1
    folders = [body["kwargs"]["weights_path"] for route, body in server.asked if route == "/collective_rpc"]
    assert len(set(folders)) == 2 and not any(Path(folder).exists() for folder in folders)


def test_the_key_of_the_server_is_sent(server: StandIn, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    VllmServer(server.url + "/v1/")(policy, PROMPTS, max_new_tokens=2)
    assert set(server.keys) == {"Bearer secret"}


# ---- What goes wrong


def with_choice(**changes: Any) -> Callable[[Any], Reply]:
    """The true answers with something else in the last of them."""

    def fault(true: Any) -> Reply:
        true["choices"][-1] |= changes
        return 200, json.dumps(true).encode()

    return fault


def fewer(true: Any) -> Reply:
    return 200, json.dumps({"choices": true["choices"][1:]}).encode()


FAULTS = {
    "error": ("/v1/completions", lambda true: (500, b'{"error": {"message": "EngineDead"}}'), "status 500.*EngineDead"),
    "garbage": ("/v1/completions", lambda true: (200, b"<html>"), "<html>.*no vLLM"),
    "no object": ("/v1/completions", lambda true: (200, b"[1]"), "no vLLM"),
    "too few": ("/v1/completions", fewer, "gave 1 answers to a prompt, 2 were asked for"),
    "no choices": ("/v1/completions", lambda true: (200, b"{}"), "no list of answers to a prompt"),
    "no ids": ("/v1/completions", with_choice(token_ids=None), "without the ids and log-probabilities"),
    "no logprobs": ("/v1/completions", with_choice(logprobs=None), "without the ids and log-probabilities"),
    "a hole": ("/v1/completions", with_choice(logprobs={"token_logprobs": [None]}), "without the ids"),
    "cut": ("/v1/completions", with_choice(token_ids=[65], logprobs={"token_logprobs": [-1]}), "--max-model-len"),
    "no answer": ("/v1/completions", lambda true: (200, b'{"choices": ["a", "b"]}'), "without the ids"),
    "aborted": ("/v1/completions", with_choice(finish_reason="abort"), "'abort'"),
    "other words": (
        "/v1/completions",
        with_choice(token_ids=[65, 70000, 65], logprobs={"token_logprobs": [-1, -1, -1]}),
        "another model than the policy's",
    ),
    "other prompt": ("/v1/completions", with_choice(prompt_token_ids=[1]), "read another prompt"),
    "other model": ("/collective_rpc", lambda true: (500, b"shape\nmismatch"), "shape mismatch.*architecture.*TMPDIR"),
    "no development mode": ("/collective_rpc", lambda true: (404, b"Not Found"), "404.*VLLM_SERVER_DEV_MODE=1"),
    "wrong key": ("/v1/models", lambda true: (401, b"Unauthorized"), "401.*VLLM_API_KEY"),
    "nothing served": ("/v1/models", lambda true: (200, b'{"data": []}'), "serves no model"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_goes_wrong_is_told_with_what_to_do(server: StandIn, policy: Policy, name: str) -> None:
    route, fault, message = FAULTS[name]
    server.faults[route] = fault
    with pytest.raises(ValueError, match=message) as told:
        VllmServer(server.url)(policy, PROMPTS, 2, max_new_tokens=3, stop_ids=())
    assert server.url in str(told.value) and "\n" not in str(told.value)


def test_a_server_that_is_away(server: StandIn) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ConnectionError, match=r"refused.*VLLM_SERVER_DEV_MODE=1 vllm serve"):
        VllmServer(server.url)


def test_a_server_that_is_too_slow(server: StandIn, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = VllmServer(server.url)
    sampler(policy, PROMPTS[:1], max_new_tokens=1)

    def slow(true: Any) -> Reply:
        time.sleep(0.5)
        return 200, b"{}"

    server.faults["/v1/completions"] = slow
    monkeypatch.setattr(vllm, "SECONDS", 0.1)
    with pytest.raises(TimeoutError, match=r"did not answer /v1/completions within 0.1 seconds"):
        sampler(policy, PROMPTS[:1], max_new_tokens=1)


def test_adapters_are_no_models_of_their_own(server: StandIn) -> None:
    server.models.append({"id": "adapter", "parent": "start"})
    assert VllmServer(server.url).model == "start"
    server.models.append({"id": "another"})
    with pytest.raises(ValueError, match="serves 2 models"):
        VllmServer(server.url)


REFUSED = [
    ({"min_p": 0.1, "top_p": 0.9}, "min_p 0.1 with top_p 0.9"),
    ({"temperature": 0.0, "n": 2}, "temperature 0 has one answer"),
    ({"temperature": 0.001}, "temperature is 0.001"),
    ({"max_new_tokens": 190}, "--max-model-len 230"),
    ({"top_k": -1}, "top_k is -1"),
    ({"stop": [""]}, "a stop text is empty"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_had_is_refused_before_anything_is_sent(
    server: StandIn, policy: Policy, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        VllmServer(server.url)(policy, PROMPTS, **settings)
    assert server.count("/collective_rpc") == 0


# ---- Commands


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(6)))
    return str(path)


def run(command: str, prompts: str, out: Path, server: StandIn, *flags: str) -> Path:
    given = [*command.split(), "--model", "tiny", "--data", prompts, "--out", str(out), "--dtype", "float32"]
    given += ["--device", "cpu", "--max-new-tokens", "4", "--sampler", f"vllm:{server.url}", *flags]
    assert main(given) == 0
    return out


TRAINING = ["--steps", "3", "--prompts-per-step", "3", "--lr", "1e-2", "--warmup", "0", "--samples", "0"]
COMMANDS = {
    "rloo": ["--reward", "length"],
    "rl --algorithm remax": ["--reward", "length", "--group-size", "1", "--lora-rank", "4"],
    "grpo": ["--reward", "length", "--temperature", "0.8"],
    "online-dpo": ["--reward", "length", "--group-size", "4"],
    "raft": ["--reward", "length"],
}


def gaps(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["logprob_gap"] for row in rows if "logprob_gap" in row]


@pytest.mark.parametrize("command", COMMANDS)
def test_online_training_sends_the_weights_after_every_step(
    command: str, prompts: str, tmp_path: Path, server: StandIn
) -> None:
    out = run(command, prompts, tmp_path / "run", server, *TRAINING, *COMMANDS[command])
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    # A rollout in which all answers tie makes no step, and the weights stay.
    assert server.count("/collective_rpc") == steps >= 2 and (out / "model").exists()
    if "dpo" not in command and command != "raft":
        assert len(gaps(out)) == 3 and max(gaps(out)) < 1e-4


def test_the_gap_shows_a_server_that_keeps_its_weights(prompts: str, tmp_path: Path, server: StandIn) -> None:
    server.reloads = False
    first, *later = gaps(run("rloo", prompts, tmp_path / "run", server, *TRAINING, "--reward", "length"))
    assert first < 1e-4 and min(later) > 1e-2


def test_held_out_answers_come_from_the_server(prompts: str, tmp_path: Path, server: StandIn) -> None:
    flags = [*TRAINING, "--reward", "length", "--eval-data", prompts]
    run("rloo", prompts, tmp_path / "run", server, *flags)
    asked = [body for route, body in server.asked if route == "/v1/completions"]
    assert len(asked) == 3 * 3 + 2 * 6 and server.count("/collective_rpc") == 4


def test_commands_that_only_sample(prompts: str, tmp_path: Path, server: StandIn) -> None:
    answers = run("generate", prompts, tmp_path / "answers.jsonl", server, "--temperature", "0")
    own = ["generate", "--model", "tiny", "--data", prompts, "--out", str(tmp_path / "own.jsonl"), "--dtype", "float32"]
    assert main([*own, "--device", "cpu", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert answers.read_text() == (tmp_path / "own.jsonl").read_text()
    best = run("best-of-n", prompts, tmp_path / "best.jsonl", server, "-n", "3", "--reward", "length")
    assert len(best.read_text().splitlines()) == 6


@pytest.mark.parametrize("sampler", ["vllm", "vllm:", "vllm:localhost:8000", "tgi:http://127.0.0.1:1", ""])
def test_other_samplers_are_refused(
    sampler: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", prompts, "--out", str(tmp_path / "run"), "--reward", "length", "--sampler", sampler]
    assert main(["rloo", "--model", "tiny", *flags]) == 2
    assert "give own, or vllm:URL" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_server_that_is_away_stops_a_command_before_it_begins(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", prompts, "--out", str(tmp_path / "run"), "--reward", "length"]
    assert main(["rloo", "--model", "tiny", *flags, "--sampler", "vllm:http://127.0.0.1:1"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert (
        told[-1].startswith("trimtab: the server at") and "vllm serve" in told[-1] and not (tmp_path / "run").exists()
    )
