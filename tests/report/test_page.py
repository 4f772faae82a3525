"""The page: what stands on it, that it loads nothing, and that no text becomes markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.report import read_run, write_report
from trimtab.report.figures import frontier_figure, lengths_figure, run_figures, running_mean, sampled_diversity
from trimtab.report.page import _for_script, table

HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    "🎬 مرحبا \u2028 \u202e & 'quoted'",
]


def make_run(directory: Path, steps: int = 3, **files: str) -> Path:
    directory.mkdir(parents=True)
    rows = [{"step": i + 1, "loss": 0.7 - 0.1 * i, "accuracy": 0.5, "lr": 1e-5} for i in range(steps)]
    evals = [{"step": 0, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}]
    contents = {
        "config.yaml": "command: dpo\nlr: 0.1\n",
        "environment.json": '{"seed": 7}',
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "evals.jsonl": "".join(json.dumps(row) + "\n" for row in evals),
    } | {name.replace("_", "."): text for name, text in files.items()}
    for name, text in contents.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def spread(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def make_summary(texts: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    names = {"start": 0.0, "best-of-4": 0.6, "dpo": 5.0}
    methods = [
        {"method": name, "gold": spread(kl / 10), "proxy": spread(kl), "kl": spread(kl), "length": spread(50 + kl)}
        | ({} if name == "start" else {"gold_gain": spread(0.3)})
        for name, kl in names.items()
    ]
    return {"model": "tiny", "methods": methods, "texts": texts or [], "commands": ["trimtab dpo"], **more}


class Page(HTMLParser):
    """The elements of a page, its visible text, and the raw text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside == "script" else self.texts).append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(tmp_path: Path) -> Page:
    texts = [{"prompt": "Review a film.", "answers": {"start": {"text": "Fine.", "gold": 0.1, "proxy": 0.0}}}]
    return Page(write_report([make_run(tmp_path / "dpo-run")], tmp_path / "out/report.html", make_summary(texts)))


def test_every_figure_has_a_place_and_every_place_a_figure(page: Page):
    places = [int(at["data-figure"] or "") for at in page.named("div") if "data-figure" in at]
    [figures] = [json.loads(script) for script in page.scripts if script.startswith("[{")]
    assert places == list(range(len(figures)))
    assert [one["title"] for one in figures] == ["Accuracy", "Reward against KL", "Length", "Loss", "Accuracy"]


def test_the_page_says_what_it_must(page: Page):
    said = ("DPO raised the gold reward by 0.30", "trimtab dpo", "lr: 0.1", '"seed": 7', "dpo-run")
    assert [text for text in said if text not in page.text] == []


def test_the_page_loads_nothing(page: Page):
    loading = [(tag, at) for tag, at in page.elements if {"src", "srcset", "data", "poster", "action"} & at.keys()]
    assert loading == []
    assert not [tag for tag, _ in page.elements if tag in {"link", "iframe", "object", "embed", "base", "img"}]
    assert all((at["href"] or "").startswith("#") for at in page.named("a"))
    [policy] = [at["content"] for at in page.named("meta") if at.get("http-equiv") == "Content-Security-Policy"]
    assert (policy or "").startswith("default-src 'none'")
    assert "http" not in (policy or "")


def test_the_style_loads_nothing(tmp_path: Path):
    text = write_report([], tmp_path / "report.html", make_summary()).read_text(encoding="utf-8")
    [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style and "@import" not in style


def test_plotly_stands_in_the_page_once(page: Page):
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_is_text_wherever_it_stands(tmp_path: Path, hostile: str):
    answers = {name: {"text": hostile, "gold": 0.1, "proxy": 0.2} for name in ("start", hostile)}
    summary = make_summary([{"prompt": hostile, "answers": answers}], commands=[hostile], note=hostile)
    summary["model"] = hostile
    summary["methods"].append({"method": hostile, "gold": spread(0.1), "kl": spread(1.0), "gold_gain": spread(0.4)})
    config = yaml.safe_dump({"command": "dpo", "note": hostile})
    run = make_run(tmp_path / "run", config_yaml=config, environment_json=json.dumps({"key": hostile}))
    harmless = write_report([make_run(tmp_path / "other")], tmp_path / "harmless.html", make_summary())
    page = Page(write_report([run], tmp_path / "report.html", summary))
    assert len(page.named("script")) == len(Page(harmless).named("script"))
    assert not [at for _, at in page.elements if any(name.startswith("on") for name in at)]
    assert not page.named("img")
    assert page.text.count(hostile) >= 3  # title, heading, command
    [texts] = [json.loads(script)["texts"] for script in page.scripts if script.startswith('{"orders')]
    assert [texts[0]["prompt"], *(answer["text"] for answer in texts[0]["answers"])] == [hostile] * 3


@pytest.mark.parametrize("steps", [0, 1, 2, 100])
def test_a_run_of_any_length_renders(tmp_path: Path, steps: int):
    run = make_run(tmp_path / "run", steps, evals_jsonl="")
    assert write_report([run], tmp_path / "report.html").is_file()
    assert [one.title for one in run_figures(read_run(run))] == (["Loss", "Accuracy"] if steps else [])


def test_nothing_at_all_renders(tmp_path: Path):
    assert "no verdict" in Page(write_report([], tmp_path / "report.html", {})).text


def test_figures_that_are_no_numbers_are_left_out(tmp_path: Path):
    metrics = '{"step": 1, "loss": NaN, "accuracy": null}\n{"step": 2, "loss": 0.5, "accuracy": null}\n'
    [loss] = run_figures(read_run(make_run(tmp_path / "run", metrics_jsonl=metrics, evals_jsonl="")))
    assert (loss.traces[0]["x"], loss.traces[0]["y"]) == ([2.0], [0.5])


@pytest.mark.parametrize("missing", ["config.yaml", "environment.json", "metrics.jsonl"])
def test_a_missing_file_is_named_with_its_run(tmp_path: Path, missing: str):
    run = make_run(tmp_path / "lost-run")
    (run / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lost-run' has no {missing}"):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_missing_run_and_a_torn_line_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    torn = make_run(tmp_path / "torn", metrics_jsonl='{"step": 1}\n{"step": 2, "lo')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        write_report([torn], tmp_path / "report.html")


def test_a_lone_surrogate_is_no_reason_to_fail(tmp_path: Path):
    texts = [{"prompt": "half \ud83d", "answers": {"start": {"text": "x"}}}]
    summary = make_summary(texts, commands=["half \ud83d"])
    assert "half ?" in Page(write_report([], tmp_path / "report.html", summary)).text


def test_gains_are_drawn_on_one_scale_around_zero():
    start, best, dpo = table(make_summary()["methods"])
    assert start.strip is None
    assert best.strip is not None and dpo.strip is not None
    assert best.strip.zero == dpo.strip.zero == 6.0  # both gains are positive, so zero is the left edge
    assert dpo.strip.zero < dpo.strip.low < dpo.strip.value < dpo.strip.high


class TestFrontier:
    def test_best_of_n_is_one_curve_from_the_start_model(self):
        figure = frontier_figure(make_summary())
        assert figure is not None
        curve = figure.traces[0]
        assert (curve["name"], curve["x"], curve["text"]) == ("Best-of-n", [0.0, 0.6], ["", "n = 4"])

    def test_estimates_of_the_frontier_make_the_curve(self):
        points = [{"method": "best-of-n", "n": n, "kl": n / 10, "gold": n / 20} for n in (4, 1, 2)]
        figure = frontier_figure(make_summary(frontier=points))
        assert figure is not None
        assert figure.traces[0]["text"] == ["", "n = 2", "n = 4"]

    def test_a_path_goes_by_step_and_ends_at_the_final_model(self):
        points = [{"method": "dpo", "step": step, "kl": kl, "gold": 0.0} for step, kl in ((None, 3), (20, 1), (5, 2))]
        figure = frontier_figure(make_summary(frontier=points))
        assert figure is not None
        [path] = [trace for trace in figure.traces if trace["name"] == "DPO, step by step"]
        assert (path["x"], path["text"]) == ([2.0, 1.0, 3.0], ["step 5", "step 20", "final model"])

    def test_error_bars_are_the_interval(self):
        figure = frontier_figure(make_summary())
        assert figure is not None
        [dpo] = [trace for trace in figure.traces if trace["name"] == "DPO"]
        assert dpo["error_y"]["array"] == pytest.approx([0.1])
        assert dpo["error_x"]["arrayminus"] == pytest.approx([0.1])

    def test_without_measurements_there_is_no_figure(self):
        assert frontier_figure({"methods": [{"method": "start", "gold": {"value": None}}]}) is None
        assert lengths_figure({}) is None


def one_of(scores: list[float]) -> dict[str, Any]:
    return {"measure": "reward", "scores": [[score] for score in scores], "lengths": [[i] for i in range(len(scores))]}


@pytest.fixture
def online(tmp_path: Path) -> Page:
    """The page of a run of online RL with everything in it, beside a run of SFT with nothing but losses."""
    evals = [
        {"step": step, **dict.fromkeys(("reward", "reward_low", "reward_high"), value), "kl": kl, "length": 10}
        for step, value, kl in ((0, 1.0, 0.0), (8, 2.0, 3.0))
    ]
    rows = {
        "metrics": [{"step": 1, "reward": 1.0, "kl": 0.0, "entropy": 2.0, "length": 10}],
        "evals": evals,
        "scores": [{"step": 0, **one_of([0.0] * 6)}, {"step": 8, **one_of([0.9, 1.1] * 3)}],
        "rollouts": [{"rollout": 1, "kl": 0.1, "health": {"cut": 1}}],
    }
    files = {f"{name}_jsonl": "".join(json.dumps(row) + "\n" for row in some) for name, some in rows.items()}
    facts = {"kind": "Prompt", "records": 7, "duplicates": {"count": 2, "examples": ["</td><script>"]}}
    made = make_run(tmp_path / "rloo", 1, config_yaml="command: rl\nkl_budget: 5\n", **files)
    (made / "data.json").write_text(json.dumps({"train": {"facts": facts}}), encoding="utf-8")
    other = make_run(tmp_path / "sft", config_yaml="command: sft\n", evals_jsonl="")
    return Page(write_report([made, other], tmp_path / "report.html"))


def test_a_run_fills_its_stage_and_the_others_stay_empty(online: Page):
    stages = [at for at in online.named("li") if "stage" in (at.get("class") or "")]
    assert ["absent" in (at["class"] or "") for at in stages] == [False, True, False]
    assert online.text.count("not in this report") == 1


def test_the_page_of_online_rl_has_its_verdict_alarms_and_figures(online: Page):
    said = (
        "rloo raised the held-out reward by 1.00",
        "The price of rloo: 3.00 nats of KL per answer",
        "rloo: most answers were cut at the length limit, in 1 of 1 rollouts.",
        "duplicates",
    )
    assert [text for text in said if text not in online.text] == []
    [figures] = [json.loads(script) for script in online.scripts if script.startswith("[{")]
    titles = [one["title"] for one in figures]
    stages, rest = titles[:3], titles[3:]
    assert stages == ["Loss", "Reward", "KL"] and rest[0] == "Held-out reward against KL"
    assert rest[1:5] == ["Reward", "KL", "Length", "Entropy"] and rest[-4:] == ["Reward"] * 4
    places = [int(at["data-figure"] or "") for at in online.named("div") if "data-figure" in at]
    assert places == list(range(len(figures)))
    assert figures[3]["layout"]["shapes"][0]["x0"] == 5


def test_without_trouble_the_page_says_what_was_looked_at(page: Page):
    assert "No alarm in 3 steps, 1 evaluation, 0 rollouts." in page.text


def test_plotly_finds_no_markup_and_no_infinity_in_a_figure():
    given = {"name": '<a href="x">&', "y": [1.0, float("nan"), float("-inf"), 10**6], "on": True, "none": None}
    shown = {"name": '&lt;a href="x">&amp;', "y": [1.0, None, None, 10**6], "on": True, "none": None}
    assert _for_script(given) == shown


def test_the_diversity_of_samples_is_that_of_first_answers_to_different_prompts():
    def said(step: Any, prompt: str, response: Any) -> dict[str, Any]:
        return {"step": step, "prompt": prompt, "response": response}

    same = [said(5, "a", "one two"), said(5, "b", "one two")]
    different = [said(0, "a", "one two"), said(0, "b", "three four"), said(0, "b", "one two")]
    ignored = [said(None, "a", "x"), said(9, "a", "alone"), said(7, "a", 3), said(8, "a", ""), said(8, "b", "")]
    first, last = sampled_diversity([*same, *different, *ignored])
    assert (first["step"], last["step"]) == (0, 5)
    # Of 4 words 4 differ, or 2; of 2 pairs of words 2, or 1: nearly all that a large vocabulary would give, or half.
    assert first["distinct_across"] == pytest.approx(1, abs=1e-4)
    assert last["distinct_across"] == pytest.approx(0.5, abs=1e-4)


def test_running_mean():
    assert running_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]
    assert running_mean([5.0], 3) == [5.0]
