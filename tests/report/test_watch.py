"""The live report: runs in every state of being written, and a server that says no more than it must."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.report.test_page import make_run
from trimtab.cli import main
from trimtab.report.live import notes, read_growing, read_live, signature, state
from trimtab.report.page import write_report
from trimtab.report.read import runs_in
from trimtab.report.watch import Watched, open_server


@contextmanager
def serving(*directories: Path) -> Iterator[str]:
    """The address of a server that watches."""
    with open_server(directories, "127.0.0.1", 0) as server, in_background(server):
        yield f"http://127.0.0.1:{server.server_port}/"


@contextmanager
def in_background(server: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def asked(address: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    request = urllib.request.Request(address, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=20) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def version_of(page: str) -> str:
    return page.partition('data-version="')[2].partition('"')[0]


class TestReading:
    def test_a_line_that_is_half_written_is_left_out_until_it_is_whole(self, tmp_path: Path):
        run = make_run(tmp_path / "run", 2)
        append(run / "metrics.jsonl", '{"step": 3, "lo')
        assert [row["step"] for row in read_growing(run).metrics] == [1, 2]
        append(run / "metrics.jsonl", 'ss": 0.5}\n')
        assert [row["step"] for row in read_growing(run).metrics] == [1, 2, 3]

    @pytest.mark.parametrize("cut", range(0, 120, 7))
    def test_a_file_that_is_cut_anywhere_is_read(self, tmp_path: Path, cut: int):
        run = make_run(tmp_path / "run", 3)
        whole = (run / "metrics.jsonl").read_bytes()
        (run / "metrics.jsonl").write_bytes(whole[:cut])
        assert len(read_growing(run).metrics) == whole[:cut].count(b"\n")

    def test_a_whole_line_that_is_no_json_is_named_where_it_stands(self, tmp_path: Path):
        run = make_run(tmp_path / "run", metrics_jsonl='{"step": 1}\n{"step": 2, "lo\n')
        with pytest.raises(ValueError) as caught:
            read_growing(run)
        assert f"{run / 'metrics.jsonl'}:2 is not JSON" in str(caught.value)

    def test_a_run_that_has_not_begun_is_waited_for(self, tmp_path: Path):
        (tmp_path / "run").mkdir()
        runs, _ = read_live([tmp_path / "run"])
        assert (state(runs, [tmp_path / "run"]), notes(runs)) == ("waiting", ["Waiting for the first metrics of run."])
        append(tmp_path / "run" / "metrics.jsonl", '{"step": 1, "loss": 0.5}\n')
        runs, _ = read_live([tmp_path / "run"])
        assert (state(runs, [tmp_path / "run"]), notes(runs)) == ("live", [])

    def test_a_run_says_when_it_is_finished(self, tmp_path: Path):
        done = make_run(tmp_path / "done", environment_json='{"finished": 3}')
        other = make_run(tmp_path / "other")
        assert state(read_live([done])[0], [done]) == "finished"
        assert state(read_live([done, other])[0], [done, other]) == "live"
        assert state([], []) == "waiting"

    def test_a_directory_of_runs_shows_them_all_and_its_summary(self, tmp_path: Path):
        for i, name in enumerate(("reward", "dpo")):
            config = make_run(tmp_path / name) / "config.yaml"
            os.utime(config, (1000 + i, 1000 + i))
        (tmp_path / "summary.json").write_text('{"model": "tiny"}')
        assert [run.name for run in runs_in(tmp_path)] == ["reward", "dpo"]
        runs, summary = read_live([tmp_path])
        assert ([run.name for run in runs], summary) == (["reward", "dpo"], {"model": "tiny"})
        assert read_live([tmp_path / "dpo", tmp_path])[1] == {}  # of several there is no one summary
        assert runs_in(tmp_path / "dpo") == [tmp_path / "dpo"]
        page = write_report([tmp_path], tmp_path / "report.html").read_text()
        assert "Steering tiny" in page and page.index("dpo") and "reward" in page

    def test_a_directory_of_several_runs_is_finished_once_it_has_a_summary(self, tmp_path: Path):
        whole = tmp_path / "all" / "quickstart"
        run = make_run(whole / "dpo", environment_json='{"finished": 3}')
        (whole / "config.yaml").write_text("command: quickstart\n")
        assert runs_in(whole) == runs_in(whole.parent) == [run]
        assert state(read_live([whole])[0], [whole]) == "live"
        (whole / "summary.json").write_text("{}")
        assert state(read_live([whole])[0], [whole]) == "finished"

    def test_the_signature_tells_what_changed(self, tmp_path: Path):
        run = make_run(tmp_path / "run")
        before = signature([run])
        assert signature([run]) == before
        (run / "weights.safetensors").write_text("no part of the page")
        (run / ".environment.json.partial").write_text("half")
        assert signature([run]) == before
        append(run / "metrics.jsonl", "x")
        assert signature([run]) != before

    def test_pipes_are_not_read(self, tmp_path: Path):
        run = make_run(tmp_path / "run")
        os.mkfifo(run / "samples.jsonl")
        assert read_growing(run).samples == []


class TestServer:
    def test_the_page_may_ask_its_own_origin_and_nobody_else(self, tmp_path: Path):
        with serving(make_run(tmp_path / "run")) as address:
            status, page, headers = asked(address)
        assert status == 200 and "connect-src &#39;self&#39;" not in page and "connect-src 'self'" in page
        assert "default-src 'none'" in page and 'data-state="live"' in page
        assert headers["Cache-Control"] == "no-store" and "frame-ancestors 'none'" in headers["Content-Security-Policy"]

    def test_a_report_may_ask_nobody(self, tmp_path: Path):
        run = make_run(tmp_path / "run")
        assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
        page = (tmp_path / "report.html").read_text()
        assert "connect-src" not in page and "fetch(" not in page.partition("plotly.js")[0] and 'id="live"' not in page

    def test_news_come_only_when_there_are_any_and_without_plotly(self, tmp_path: Path):
        run = make_run(tmp_path / "run", 1)
        watched = Watched([run])
        version, page = watched.newest()
        assert watched.newest()[0] == version == version_of(page)
        append(run / "metrics.jsonl", '{"step": 2, "loss": 0.125}\n')
        watched.not_before = 0.0
        assert watched.newest()[0] != version
        assert "0.125" in watched.newest()[1]
        with serving(run) as address:
            version = version_of(asked(address)[1])
            assert asked(f"{address}?since={version}")[:2] == (204, "")
            status, news, _ = asked(f"{address}?since=older")
            assert status == 200 and len(news) < 500_000 and version_of(news) == version

    def test_rendering_leaves_the_processor_to_training(self, tmp_path: Path):
        run = make_run(tmp_path / "run", 1)
        watched = Watched([run])
        first = watched.newest()
        append(run / "metrics.jsonl", '{"step": 2, "loss": 0.5}\n')
        watched.not_before += 1000.0
        assert watched.newest() == first

    def test_what_cannot_be_read_is_told_above_what_was_read_last(self, tmp_path: Path):
        run = make_run(tmp_path / "run", 1)
        watched = Watched([run])
        for name, line, why in (
            ("metrics.jsonl", "nonsense\n", "metrics.jsonl:2 is not JSON"),
            ("samples.jsonl", '{"step": 1}\n', "samples.jsonl of run, row 1"),
        ):
            before = (run / name).read_text() if (run / name).exists() else ""
            append(run / name, line)
            watched.not_before = 0.0
            page = watched.newest()[1]
            assert why in page and '"title": "Loss"' in page
            (run / name).write_text(before)

    def test_a_run_that_is_begun_again_is_waited_for(self, tmp_path: Path):
        run = make_run(tmp_path / "run", 1)
        watched = Watched([run])
        for path in run.iterdir():
            path.unlink()
        watched.not_before = 0.0
        assert "Waiting for the first metrics of run." in watched.newest()[1]
        run.rmdir()
        watched.not_before = 0.0
        assert "There is no directory" in watched.newest()[1]
        make_run(run, 1)
        watched.not_before = 0.0
        assert (
            'data-state="live"' in watched.newest()[1] and "Waiting" not in watched.newest()[1].partition("<script")[0]
        )

    def test_another_name_is_not_answered(self, tmp_path: Path):
        with serving(make_run(tmp_path / "run")) as address:
            assert asked(address, Host="evil.example:80")[0] == 403
            assert asked(address, Host="")[0] == 403
            assert asked(address, Host="localhost")[0] == 200

    def test_there_is_one_page_alone(self, tmp_path: Path):
        with serving(make_run(tmp_path / "run")) as address:
            assert asked(f"{address}favicon.ico")[0] == 204
            assert asked(f"{address}config.yaml")[0] == asked(f"{address}../../etc/passwd")[0] == 404


class TestCommand:
    def test_mistakes_are_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        run = str(make_run(tmp_path / "run"))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            assert main(["watch", run, "--port", port]) == 2
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
        assert main(["watch", str(tmp_path / "nowhere"), "--port", "0"]) == 2
        assert "There is no directory" in capsys.readouterr().err
        assert main(["watch"]) == 2 and main(["watch", run, "--port", "65536"]) == 2
        assert main(["watch", run, "--port", "0", "--host", "no.such.host.invalid"]) == 2
        assert "cannot listen on no.such.host.invalid" in capsys.readouterr().err

    def test_ctrl_c_ends_it_quietly(self, tmp_path: Path):
        run = make_run(tmp_path / "run")
        # A suite that runs in the background of a script has been told to ignore Ctrl-C, and its children with it.
        heeding = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        begin = heeding + "from trimtab.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", begin, "watch", str(run), "--port", "0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                line = process.stderr.readline()
                assert "watching" in line and "http://127.0.0.1:" in line
                status, page, _ = asked(line.split(" at ")[1].split()[0])
                assert status == 200 and "Training run" in page
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=20)[1] == "" and process.returncode == 0
            finally:
                process.kill()


def test_rows_that_grow_are_shown_as_json(tmp_path: Path):
    """What is said while a run goes on reaches the page."""
    run = make_run(tmp_path / "run", 1)
    append(run / "samples.jsonl", json.dumps({"step": 0, "prompt": "Why?", "response": "Because <b>so</b>."}) + "\n")
    page = Watched([run]).newest()[1]
    assert "Because \\u003cb\\u003eso" in page and "before, step 0" in page
