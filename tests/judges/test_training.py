"""A language model that labels while a policy learns."""

import json
from pathlib import Path

import pytest

from tests.judges.servers import completion, serving, shown
from trimtab.cli import main


def test_online_dpo_learns_from_a_language_model_and_tells_what_it_could_not_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("trimtab.judges.endpoint.Patience.pause", lambda patience, seconds: None)
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(4)))

    def longer(asked: str, number: int) -> tuple[int, bytes]:
        first, second = shown(asked)
        return (500, b"") if "Say 3." in asked else completion(f"Verdict: {'BA'[len(first) >= len(second)]}")

    with serving(longer) as server:
        flags = ["--model", "tiny", "--data", str(data), "--out", str(tmp_path / "run"), "--dtype", "float32"]
        flags += ["--judge", f"llm:{server.url}#judge", "--steps", "2", "--prompts-per-step", "4"]
        assert main(["online-dpo", *flags, "--max-new-tokens", "6", "--samples", "0"]) == 0
    told = capsys.readouterr().err
    assert "judge: 12 questions answered" in told and "4 failed (500 Internal Server Error)" in told
    assert "learned from" in told
