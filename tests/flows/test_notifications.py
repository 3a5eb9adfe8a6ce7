"""Notifications of real runs through a real webhook block: what is said, and that silence is no error."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from prefect.states import Completed, Failed

from flows.notifications import NOTIFIED, message
from flows.quantize_model import compare_schemes, quantize_model, quantize_recipes
from tests.flows.conftest import REPOSITORY, PrefectServer
from tests.flows.sample_report import sample_report

_SAVE = """
import sys
from prefect.blocks.notifications import CustomWebhookNotificationBlock
for name, path in (("of-the-test", ""), ("of-the-test-refuses", "a-secret")):
    CustomWebhookNotificationBlock(
        name="team",
        url=sys.argv[1] + path,
        json_data={"subject": "{{subject}}", "body": "{{body}}"},
        allow_private_urls=True,
    ).save(name, overwrite=True)
"""


@pytest.mark.parametrize("flow", [quantize_model, quantize_recipes, compare_schemes], ids=lambda f: f.name)
def test_conversions_notify_however_they_end(flow):
    hooks = (flow.on_completion_hooks, flow.on_failure_hooks)
    assert hooks == (NOTIFIED["on_completion"], NOTIFIED["on_failure"])
    assert flow.on_crashed_hooks == NOTIFIED["on_crashed"]
    assert flow.on_cancellation_hooks == NOTIFIED["on_cancellation"]


def test_message_of_several_outputs_has_the_verdict_and_report_of_each():
    reports = [sample_report(), {**sample_report(), "output": "s3://other/out"}]
    lines = message(Completed(data=reports), "the place").splitlines()
    assert sum(line.startswith("Perplexity: ") for line in lines) == 2
    assert lines[-2:] == ["s3://other/out/quantmill_report.html", "the place"]


def test_message_of_a_failure_is_its_reason():
    assert message(Failed(message="RecipeError: no text"), "the place") == "RecipeError: no text\nthe place"


@pytest.fixture(scope="module")
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Address of a server that takes what is posted, and what it took."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/":
                received.append(sent)
            self.send_response(204 if self.path == "/" else 403)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", received
    server.shutdown()
    server.server_close()


def run_program(server: PrefectServer, *words: str, **more: str) -> subprocess.CompletedProcess:
    ended = subprocess.run(
        [sys.executable, *words],
        env=server.environment | more,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture(scope="module")
def block(prefect_server: PrefectServer, webhook) -> str:
    run_program(prefect_server, "-c", _SAVE, webhook[0])
    return "custom-webhook/of-the-test"


@pytest.mark.slow
def test_ended_runs_are_told_with_verdict_or_reason_and_where_to_look(prefect_server, webhook, block):
    _, received = webhook
    ended = run_program(prefect_server, "-m", "tests.flows.notifying_program", QUANTMILL_NOTIFY=block)
    runs = json.loads(ended.stdout)
    told = {one["subject"].rpartition(": ")[2]: one for one in received}
    assert {name: one["subject"] for name, one in told.items()} == {
        "Completed": "notifying-program that completed: Completed",
        "Failed": "notifying-program that failed: Failed",
        "Crashed": "notifying-program that crashed: Crashed",
    }
    assert "Perplexity: " in told["Completed"]["body"]
    assert "quantmill_report.html" in told["Completed"]["body"]
    assert "the text is too short" in told["Failed"]["body"]
    for name, one in told.items():
        assert runs[name.lower()] in one["body"].splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "slug", ["custom-webhook/of-the-test-refuses", "custom-webhook/nobody", "no-slug", ""]
)
def test_run_goes_on_where_nobody_can_be_told(prefect_server, block, slug):
    ended = run_program(
        prefect_server,
        "-m",
        "tests.flows.notifying_program",
        QUANTMILL_NOTIFY=slug,
    )
    assert set(json.loads(ended.stdout)) == {"completed", "failed", "crashed", "told to end"}
    assert ended.stderr.count("nobody was told") == (3 if slug else 0)
    assert "An error was encountered while running hook" not in ended.stderr
    assert "a-secret" not in ended.stderr
