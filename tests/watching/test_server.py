"""The server of a run's page answers this machine alone, with two answers, and never writes or hands out a file."""

import json
import socket
import subprocess
import sys

import pytest
from testing.watched_runs import ask, ask_version, list_files, make_live, make_log, make_run, serving

from hf_dissect.report.live import append_log
from hf_dissect.watching.run_folder import RunFolder
from hf_dissect.watching.server import DEFAULT_PORT, is_this_machine, open_server

SCRIPT = "<script>alert(1)</script>"


def test_the_page_follows_the_folder_and_leaves_it_as_it_is(tmp_path):
    folder = make_run(tmp_path / "run")
    before = list_files(folder)
    with serving(folder) as server:
        status, headers, page = ask(server)
        assert status == 200 and "Training: step 30 of 100" in page and "mine: dissect" in page
        assert "Matched pairs, estimated (π)" in page and "0.750" in page
        assert headers["Content-Security-Policy"].startswith("default-src 'none'") and "ETag" not in headers
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        first = ask_version(server)
        assert f'data-version="{first["version"]}"' in page and 0 <= first["age"] < 60
        assert ask(server, method="HEAD")[2] == "" and ask(server)[2] == page
        assert list_files(folder) == before
        append_log(folder, make_log(40))
        server.drawer._due = 0.0
        assert ask_version(server)["version"] != first["version"]
        assert "Training: step 40 of 100" in ask(server)[2]


def test_it_is_not_drawn_more_often_than_the_machine_bears(tmp_path):
    folder = make_run(tmp_path)
    with serving(folder) as server:
        page, version = ask(server)[2], ask_version(server)["version"]
        server.drawer._due += 3600
        append_log(folder, make_log(40))
        assert ask_version(server)["version"] == version and ask(server)[2] == page


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/log.jsonl",
            "/live.json",
            "/../secret",
            "/..%2fsecret",
            "//etc/passwd",
            "/%2e%2e/secret",
            "/.",
            "/?/../secret",
        ),
        *("/static/x", "/version/", "/\\..\\secret", "/favicon.ico", "http://127.0.0.1/secret", "/index.html", "*"),
    ],
)
def test_no_file_is_handed_out(tmp_path, path):
    (tmp_path / "secret").write_text("SECRET")
    with serving(make_run(tmp_path / "run")) as server:
        status, _, text = ask(server, path)
        assert (status, "SECRET" in text) == (200 if path.startswith("/?") else 404, False)
        assert "passwd" not in text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_but_reading_is_answered(tmp_path, method):
    with serving(make_run(tmp_path)) as server:
        status, headers, _ = ask(server, method=method)
        assert status == 405 and headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "host, answered",
    [
        *((name, True) for name in ("127.0.0.1", "localhost:8050", "LOCALHOST", "[::1]:9000", "127.0.0.1:1")),
        *((name, False) for name in ("evil.example", "evil.example:8050", "127.0.0.1.evil.example", "localhost.evil")),
        *(
            (name, False)
            for name in ("", "127.0.0.1@evil.example", "evil@localhost", "localhost:x", "[::1", "0.0.0.0")
        ),
        *((name, False) for name in ("localhost/x", "127.1", "2130706433", "169.254.169.254", "::1")),
    ],
)
def test_only_names_of_this_machine_are_answered(tmp_path, host, answered):
    """A page elsewhere can move its own name to 127.0.0.1, but not send another name."""
    assert is_this_machine([host]) == answered and not is_this_machine([host, host]) and not is_this_machine([])
    if host:
        with serving(make_run(tmp_path)) as server:
            status, _, text = ask(server, Host=host)
            assert (status == 200) == answered and ("mine: dissect" in text) == answered


def test_it_listens_on_this_machine_alone(tmp_path):
    with serving(make_run(tmp_path)) as server:
        assert (
            server.server_address[0] == "127.0.0.1" and server.url == f"http://127.0.0.1:{server.server_address[1]}/"
        )


def test_a_port_in_use_is_left_for_the_next_one_or_named(tmp_path):
    folder = RunFolder(make_run(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} is in use; name another one"):
            open_server(folder, port)
    with open_server(folder, None) as first, open_server(folder, None) as second:
        ports = first.server_address[1], second.server_address[1]
        assert DEFAULT_PORT <= ports[0] < ports[1]


def test_broken_requests_end_nothing(tmp_path):
    with serving(make_run(tmp_path)) as server:
        for request in (
            b"\x16\x03\x01\x00\xff",
            b"GET /\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"",
            b"GET " + b"/" * 10**5,
        ):
            with socket.create_connection(server.server_address, timeout=5) as connection:
                connection.sendall(request)
        with socket.create_connection(server.server_address, timeout=5):  # silent
            assert ask(server)[0] == 200


def test_a_folder_that_disappears_is_an_error_until_it_is_back(tmp_path, caplog):
    folder = make_run(tmp_path / "run")
    with serving(folder) as server:
        assert ask(server)[0] == 200
        folder.rename(tmp_path / "elsewhere")
        server.drawer._due = 0.0
        assert [ask(server)[0] for _ in range(3)] == [500] * 3
        assert len([record for record in caplog.records if "was removed" in record.message]) == 1
        (tmp_path / "elsewhere").rename(folder)
        assert ask(server)[0] == 200


def test_nothing_of_the_run_becomes_markup(tmp_path):
    hostile = (
        f"{SCRIPT} \ud800",
        '"><img src=x onerror=alert(2)>',
        "javascript:alert(3)",
        "</style></script><svg onload=alert(4)>",
    )
    metrics = {
        "name": SCRIPT,
        "strategy": SCRIPT,
        "settings": {SCRIPT: SCRIPT},
        "alerts": [{"step": SCRIPT, "subject": "x", "title": SCRIPT, "text": SCRIPT}, SCRIPT],
        "bad_rows": {"count": 1, "reasons": {SCRIPT: 1}, "ids": [SCRIPT]},
    }
    folder = make_run(
        tmp_path / "<b>run", captions=hostile, title=SCRIPT, metrics=metrics, state="stopped", reason=SCRIPT
    )
    append_log(folder, make_log(40, **{SCRIPT: SCRIPT, "eval_recall_sum": SCRIPT}))
    with serving(folder) as server:
        page = ask(server)[2]
        assert page.count("<script") == 1 and "<img src=x" not in page and "<svg onload" not in page
        assert page.count("alert(1)") > 8


def test_the_command_starts_without_torch_and_ends_with_ctrl_c(tmp_path):
    folder = make_run(tmp_path)
    code = (
        "import signal, sys, threading, urllib.request, hf_dissect.watching.server as server\n"
        "from hf_dissect.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell ignores it in the background
        "start = server.WatchServer.serve_forever\n"
        "def serve(self):\n"
        "    def visit():\n"
        "        print(len(urllib.request.urlopen(self.url).read()) > 1000, flush=True)\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    threading.Thread(target=visit).start()\n"
        "    start(self)\n"
        "server.WatchServer.serve_forever = serve\n"
        f"status = main(['watch', {str(folder)!r}, '--port', '0', '--no-browser'])\n"
        "print(status, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert done.stderr == "" and lines[0].startswith(f"{folder}: http://127.0.0.1:") and lines[1] == "True"
    assert lines[-2:] == ["Ended; the run continues.", "0 False"]


def test_the_answer_to_the_script_is_json(tmp_path):
    with serving(make_run(tmp_path)) as server:
        _, headers, text = ask(server, "/version?x=1")
        assert headers["Content-Type"].startswith("application/json") and json.loads(text).keys() == {"version", "age"}
        make_live(step=20).save(tmp_path)
        server.drawer._due = 0.0
        assert ask_version(server)["version"] != json.loads(text)["version"]
