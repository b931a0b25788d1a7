# this_file: tests/examples/badday/test_script.py
"""The script language: what a line means, and what it says when it means nothing."""

from __future__ import annotations

import pytest
from badday.script import Answer, Quota, ScriptError, parse_script


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("/x 200", [Answer()]),
        ("/x 500*2 200", [Answer(status=500), Answer(status=500), Answer()]),
        ("/x 200@0.4", [Answer(delay=0.4)]),
        ("/x 429(0.2)", [Answer(status=429, retry_after=0.2)]),
        ("/x 503(1)@0.5*2", [Answer(status=503, retry_after=1.0, delay=0.5)] * 2),
        ("/x hang reset drop", [Answer("hang"), Answer("reset"), Answer("drop")]),
    ],
)
def test_answers_are_read_as_written(text: str, answers: list[Answer]) -> None:
    (route,) = parse_script(text)
    assert list(route.answers) == answers


def test_the_last_answer_repeats_for_ever() -> None:
    (route,) = parse_script("/x 500 503 200")
    assert [route.answer(nth).status for nth in range(5)] == [500, 503, 200, 200, 200]


def test_dots_start_again_from_the_first_answer() -> None:
    (route,) = parse_script("/x 200 500 ...")
    assert [route.answer(nth).status for nth in range(4)] == [200, 500, 200, 500]


def test_conditions_quota_and_split_are_read() -> None:
    (route,) = parse_script("/chat model=gpt-4 per=key quota=20/0.5s 200  # a comment")
    assert route.where == (("model", "gpt-4"),)
    assert route.per == "key"
    assert route.quota == Quota(20, 0.5)
    assert route.text == "/chat model=gpt-4"


@pytest.mark.parametrize(
    ("path", "asked", "matches"),
    [
        ("/users", "/users", True),
        ("/users", "/users/7", False),
        ("/users/*", "/users/7", True),
        ("/users/*", "/user", False),
        ("/users*", "/users", True),
    ],
)
def test_a_star_makes_a_path_a_prefix(path: str, asked: str, matches: bool) -> None:
    (route,) = parse_script(f"{path} 200")
    assert route.matches(asked, {}) is matches


def test_an_empty_condition_asks_for_a_missing_field() -> None:
    (route,) = parse_script("/chat key= 401")
    assert route.matches("/chat", {})
    assert not route.matches("/chat", {"key": "sk-1"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("users 200", "starts with its path"),
        ("/users", "needs an answer"),
        ("/users ...", "needs an answer"),
        ("/users explode", "hang, reset or drop, not 'explode'"),
        ("/users status", "hang, reset or drop, not 'status'"),
        ("/users 200!", "cannot read the answer '200!'"),
        ("/users quota=lots 200", "quota=20/1s"),
        ("/users quota=0/1s 200", "quota=20/1s"),
        ("/users outage=noon 200", "outage=0.5-2s"),
        ("/users outage=2-1s 200", "outage=0.5-2s"),
    ],
)
def test_a_wrong_line_is_refused_with_a_hint(line: str, message: str) -> None:
    with pytest.raises(ScriptError, match=message):
        parse_script(line)
