# this_file: tests/examples/test_server.py
"""The example server over real sockets: every kind of bad answer, exact books, clean end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from server import BadDayServer

Serve = Callable[[str], tuple[BadDayServer, httpx.Client]]


class HandClock:
    """A clock that a test sets by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def serve(clock: HandClock) -> Iterator[Serve]:
    """Start a server with a script on the test's clock; return it with a client for it."""
    running: list[tuple[BadDayServer, httpx.Client]] = []

    def start(script: str) -> tuple[BadDayServer, httpx.Client]:
        server = BadDayServer(script, clock=clock).__enter__()
        client = httpx.Client(base_url=server.url, timeout=5, trust_env=False)
        running.append((server, client))
        return server, client

    yield start
    for server, client in running:
        client.close()
        server.__exit__()


def chat(client: httpx.Client, model: str = "gpt-3.5", key: str = "sk-live-0001") -> httpx.Response:
    return client.post(
        "/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": model, "messages": [{"role": "user", "content": "two words"}]},
    )


def test_a_route_fails_its_first_calls_and_then_answers(serve: Serve) -> None:
    _, client = serve("/users 500*2 200")
    assert [client.get("/users").status_code for _ in range(4)] == [500, 500, 200, 200]


def test_a_429_names_its_pause_in_seconds_and_milliseconds(serve: Serve) -> None:
    _, client = serve("/busy 429(0.2)")
    answer = client.get("/busy")
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["retry-after-ms"] == "200"
    assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert "date" in answer.headers


def test_a_quota_is_enforced_and_counted_by_the_servers_clock(
    serve: Serve, clock: HandClock
) -> None:
    server, client = serve("/search quota=3/1s 200")
    statuses = []
    for now in (0.0, 0.25, 0.5, 0.75, 1.0, 1.125, 1.25):
        clock.now = 100 + now
        statuses.append(client.get("/search").status_code)
    assert statuses == [200, 200, 200, 429, 200, 429, 200]
    assert server.report()["routes"]["/search"] == {
        "calls": 7,
        "outcomes": {"200": 5, "429": 2},
        "quota": {"limit": 3, "period": 1.0, "worst_window": 5, "rejected": 2},
    }


def test_a_quota_answer_has_retry_after_and_remaining(serve: Serve, clock: HandClock) -> None:
    _, client = serve("/search quota=2/1s 200")
    first = client.get("/search")
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    clock.now += 0.5
    client.get("/search")
    clock.now += 0.25
    refused = client.get("/search")
    assert refused.status_code == 429
    assert refused.headers["retry-after-ms"] == "250"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"] == "750ms"


def test_many_clients_at_once_are_counted_exactly(serve: Serve) -> None:
    server, _ = serve("/search quota=50/60s 200")

    def some(_: int) -> list[int]:
        with httpx.Client(base_url=server.url, trust_env=False) as own:
            return [own.get("/search").status_code for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        statuses = [status for part in pool.map(some, range(4)) for status in part]
    assert statuses.count(200) == 50
    assert statuses.count(429) == 30
    quota = server.report()["routes"]["/search"]["quota"]
    assert quota == {"limit": 50, "period": 60.0, "worst_window": 80, "rejected": 30}


def test_a_slow_answer_comes_after_its_delay(serve: Serve) -> None:
    _, client = serve("/slow 200@0.05")
    started = time.monotonic()
    assert client.get("/slow").status_code == 200
    assert time.monotonic() - started >= 0.05


def test_a_slow_answer_disturbs_no_other_client(serve: Serve) -> None:
    server, client = serve("/slow 200@60\n/quick 200")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, "/slow", timeout=httpx.Timeout(20, read=0.09))
        while not server.calls("/slow"):
            time.sleep(0.001)
        assert httpx.get(f"{server.url}/quick", trust_env=False).status_code == 200
        assert isinstance(waiting.exception(), httpx.ReadTimeout)


def test_a_hanging_answer_outlasts_any_client_and_is_booked_as_abandoned(serve: Serve) -> None:
    server, client = serve("/stuck hang 200")
    with pytest.raises(httpx.ReadTimeout):
        client.get("/stuck", timeout=httpx.Timeout(20, read=0.05))
    assert client.get("/stuck").json() == {"path": "/stuck", "query": "", "call": 2}
    assert server.report()["routes"]["/stuck"]["outcomes"] == {"hang": 1, "200": 1}
    assert server.report()["abandoned"] == 1


def test_a_reset_connection_is_a_read_error(serve: Serve) -> None:
    _, client = serve("/mirror reset")
    with pytest.raises(httpx.ReadError):
        client.get("/mirror")


def test_a_dropped_answer_is_a_protocol_error(serve: Serve) -> None:
    _, client = serve("/mirror drop")
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/mirror")


def test_the_dead_mirror_refuses_every_connection(serve: Serve) -> None:
    server, _ = serve("/x 200")
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.dead_url, trust_env=False)


def test_an_unknown_path_is_404_and_booked_apart(serve: Serve) -> None:
    server, client = serve("/x 200")
    assert client.get("/nowhere").status_code == 404
    assert server.report()["unrouted"] == 1
    assert server.report()["calls"] == 0


def test_nonsense_is_answered_and_the_connection_closed(serve: Serve) -> None:
    _, client = serve("/x 200")
    answer = client.post("/x", content=(part for part in [b"chunked"]))
    assert answer.status_code == 411
    assert answer.headers["connection"] == "close"


def test_the_report_is_the_same_over_http(serve: Serve) -> None:
    server, client = serve("/x 200\n/y 500")
    client.get("/x")
    client.get("/y")
    assert client.get("/report").json() == server.report()
    assert server.calls("/x") == 1


def test_a_reset_forgets_counts_and_starts_the_script_again(serve: Serve) -> None:
    server, client = serve("/x quota=1/60s 500 200")
    assert [client.get("/x").status_code for _ in range(2)] == [500, 429]
    assert client.post("/reset").json() == {"reset": True}
    assert server.report()["calls"] == 0
    assert client.get("/x").status_code == 500


def test_a_reset_can_bring_a_new_script(serve: Serve) -> None:
    server, client = serve("/x 500")
    server.reset("/x 200")
    assert client.get("/x").status_code == 200


def test_an_overloaded_model_fails_while_another_one_answers(serve: Serve) -> None:
    _, client = serve("/v1/chat/completions model=gpt-4 503\n/v1/chat/completions 200")
    overloaded = chat(client, "gpt-4")
    assert overloaded.status_code == 503
    assert overloaded.json()["error"]["type"] == "server_error"
    answer = chat(client).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "gpt-3.5"
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_usage_is_counted_in_the_answer_and_in_the_report(serve: Serve) -> None:
    server, client = serve("/v1/chat/completions 200")
    usage = chat(client).json()["usage"]
    assert usage == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}
    chat(client)
    assert server.report()["usage"] == {
        "gpt-3.5": {
            "requests": 2,
            "prompt_tokens": 4,
            "completion_tokens": 12,
            "total_tokens": 16,
        }
    }


def test_a_wrong_key_is_401_and_is_not_repeated_in_full(serve: Serve) -> None:
    _, client = serve("/v1/chat/completions key=sk-wrong-1234 401\n/v1/chat/completions 200")
    refused = chat(client, key="sk-wrong-1234")
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert "sk-wrong-1234" not in refused.text
    assert chat(client).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "model"),
        ({"model": "gpt-4"}, "messages"),
        ({"model": "gpt-4", "messages": []}, "messages"),
        ({"model": "gpt-4", "messages": [{}], "stream": True}, "stream"),
    ],
)
def test_a_malformed_chat_request_is_400(
    serve: Serve, body: dict[str, object], message: str
) -> None:
    _, client = serve("/v1/chat/completions 200")
    refused = client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "invalid_request_error"
    assert message in refused.json()["error"]["message"]


def test_the_server_ends_while_clients_still_wait() -> None:
    with BadDayServer("/stuck hang") as server:
        client = httpx.Client(base_url=server.url, timeout=5, trust_env=False)
        caught: list[Exception] = []

        def wait() -> None:
            try:
                client.get("/stuck")
            except httpx.HTTPError as error:
                caught.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while not server.report()["calls"]:
            time.sleep(0.001)
    waiting.join(20)
    client.close()
    assert [type(error) for error in caught] == [httpx.RemoteProtocolError]
    assert not [thread for thread in threading.enumerate() if thread.name == "bad-day-server"]


def test_a_taken_port_is_an_error_at_once() -> None:
    with (
        BadDayServer("/x 200") as server,
        pytest.raises(OSError, match="in use"),
        BadDayServer("/x 200", port=int(server.url.rpartition(":")[2])),
    ):
        pass


def test_it_runs_as_a_program_on_a_free_port(examples: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.txt"
    script.write_text("/x 418\n", encoding="utf-8")
    program = [sys.executable, "-W", "error", "server.py", "--port", "0", "--script", str(script)]
    with subprocess.Popen(program, cwd=examples, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            url = running.stdout.readline().strip()
            assert httpx.get(f"{url}/x", trust_env=False).status_code == 418
        finally:
            running.kill()
