# this_file: tests/orchestrator/test_config.py
"""Configuration objects: what they check, and which options they become."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import tenacity
from tests.tables import rows

from opero import (
    ConcurrencyConfig,
    MultiprocessConfig,
    Orchestrator,
    OrchestratorConfig,
    RateLimitConfig,
    RateLimiter,
    RetryConfig,
    get_logger,
)
from opero.errors import OperoUsageError
from opero.testing import flaky

WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (RetryConfig, {"max_attempts": 0}, "max_attempts=0 must be a whole number, 1 or more"),
    (RetryConfig, {"max_attempts": True}, "max_attempts=True"),
    (RetryConfig, {"wait_min": -1}, "wait_min=-1"),
    (RetryConfig, {"wait_max": "soon"}, "wait_max='soon'"),
    (RetryConfig, {"wait_min": 5, "wait_max": 2}, "wait_min=5 is longer than wait_max=2"),
    (RetryConfig, {"wait_multiplier": -1}, "wait_multiplier=-1 must be a number of seconds"),
    (RetryConfig, {"wait_multiplier": "2"}, "wait_multiplier='2'"),
    (RetryConfig, {"retry_exceptions": ()}, "retry_exceptions="),
    (RetryConfig, {"retry_exceptions": "ValueError"}, "retry_exceptions='ValueError'"),
    (RetryConfig, {"reraise": 1}, "reraise=1 must be True or False"),
    (RateLimitConfig, {"rate": 0}, "rate=0"),
    (RateLimitConfig, {"rate": None}, "rate=None limits nothing"),
    (ConcurrencyConfig, {"limit": 0}, "limit=0"),
    (MultiprocessConfig, {"max_workers": 0}, "max_workers=0"),
    (
        MultiprocessConfig,
        {"backend": "patos"},
        "backend='patos' must be one of .*Did you mean 'pathos'",
    ),
    (OrchestratorConfig, {"retry_config": 3}, "retry_config=3 must be a RetryConfig: write"),
    (OrchestratorConfig, {"fallbacks": [5]}, r"fallbacks=\[5\] must be a function or a list"),
    (OrchestratorConfig, {"fallbacks": 5}, "fallbacks=5 must be a function or a list"),
    (OrchestratorConfig, {"logger": "app"}, "logger='app' must be a logger"),
    (OrchestratorConfig, {"options": {"timout": 5}}, "no option 'timout'. Did you mean 'timeout'"),
    (OrchestratorConfig, {"options": {"timeout": -1}}, "timeout=-1"),
    (
        OrchestratorConfig,
        {"options": {"cache": True}},
        "'cache' has a place of its own: write cache=",
    ),
    (
        OrchestratorConfig,
        {"options": {"retries": 1}},
        "options: 'retries' has a place of its own: write retry_config=",
    ),
    (OrchestratorConfig, {"cache_ttl": 60}, "cache_ttl=60 does nothing without cache=True"),
    (
        OrchestratorConfig,
        {"cache_backend": "disk"},
        "cache_backend='disk' does nothing without cache=True",
    ),
]


@rows(("kind", "given", "message"), WRONG)
def test_what_cannot_work_is_refused_by_name(
    kind: Any, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(OperoUsageError, match=message):
        kind(**given)


@pytest.mark.parametrize(
    "config",
    [
        RetryConfig(max_attempts=5, retry_exceptions=(ConnectionError,)),
        RateLimitConfig(rate="100/minute"),
        ConcurrencyConfig(limit=5),
        MultiprocessConfig(max_workers=2),
        OrchestratorConfig(fallbacks=[print], logger=get_logger("app")),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_configuration_is_comparable_and_can_be_pickled(config: Any) -> None:
    with pytest.raises(OperoUsageError, match="has no 'anything'"):
        config.anything = 1
    assert pickle.loads(pickle.dumps(config)) == config
    assert repr(config).startswith(type(config).__name__)


def test_a_configuration_shows_what_was_given() -> None:
    assert repr(OrchestratorConfig()) == "OrchestratorConfig()"
    shown = repr(OrchestratorConfig(concurrency_config=ConcurrencyConfig(2), cache=True))
    assert shown == "OrchestratorConfig(concurrency_config=ConcurrencyConfig(limit=2), cache=True)"


def test_everything_is_off_by_default() -> None:
    assert OrchestratorConfig().as_options() == {"cache": False, "retries": 0}


def test_attempts_are_one_more_than_retries() -> None:
    assert RetryConfig(max_attempts=3).as_options()["retries"] == 2
    assert RetryConfig(max_attempts=1).as_options()["retries"] == 0


def test_a_list_of_exceptions_is_a_tuple() -> None:
    config = RetryConfig(retry_exceptions=[ValueError, KeyError])  # type: ignore[arg-type]
    assert config.retry_exceptions == (ValueError, KeyError)


@rows("retry", [1, 2, 3, 4, 9, 2000])
@rows(("multiplier", "low", "high"), [(1, 0, 60), (2, 2, 30), (0.1, 0.1, 1), (0, 0, 5)])
def test_pauses_are_those_of_tenacity(
    retry: int, multiplier: float, low: float, high: float
) -> None:
    wait = RetryConfig(wait_multiplier=multiplier, wait_min=low, wait_max=high).as_options()["wait"]
    state: Any = type("State", (), {"attempt_number": retry})()
    theirs = tenacity.wait_exponential(multiplier=multiplier, min=low, max=high)
    assert wait(state) == theirs(state)
    assert pickle.loads(pickle.dumps(wait)) == wait


def test_parts_become_options() -> None:
    limiter = RateLimiter("5/s")
    config = OrchestratorConfig(
        retry_config=RetryConfig(max_attempts=2),
        rate_limit_config=RateLimitConfig(limiter),
        concurrency_config=ConcurrencyConfig(7),
        cache=True,
        cache_ttl="1m",
        options={"timeout": 5},
    )
    made = config.as_options()
    assert {name: made[name] for name in ("retries", "rate_limit", "concurrency", "timeout")} == {
        "retries": 1,
        "rate_limit": limiter,
        "concurrency": 7,
        "timeout": 5,
    }
    assert made["cache_ttl"] == "1m"


def test_the_names_of_backends_become_modes() -> None:
    assert MultiprocessConfig(2, "pathos").as_options() == {"mode": "process", "workers": 2}
    assert MultiprocessConfig(3, "multiprocessing").as_options()["mode"] == "process"
    assert MultiprocessConfig(backend="aiomultiprocess").as_options()["mode"] == "async_process"


def test_one_fallback_needs_no_list() -> None:
    assert OrchestratorConfig(fallbacks=print).fallbacks == (print,)


# --- changes --------------------------------------------------------------------------------------


def test_a_changed_configuration_is_checked_and_a_wrong_change_undone() -> None:
    retry = RetryConfig(max_attempts=2)
    retry.max_attempts = 4
    assert retry.as_options()["retries"] == 3
    with pytest.raises(OperoUsageError, match="max_attempts=0"):
        retry.max_attempts = 0
    assert retry.max_attempts == 4


def test_an_orchestrator_uses_a_changed_configuration_from_the_next_call_on() -> None:
    config = OrchestratorConfig(retry_config=RetryConfig(max_attempts=1, wait_min=0, wait_max=0))
    orchestrator = Orchestrator(config)
    fetch = flaky("ok", failures=2)
    with pytest.raises(ConnectionError):
        orchestrator.execute_sync(fetch)
    assert config.retry_config is not None
    config.retry_config.max_attempts = 2
    assert orchestrator.execute_sync(fetch) == "ok"
    config.fallbacks = [len]
    assert orchestrator.execute_sync(int, "x") == 1
    chains = orchestrator.chains
    RetryConfig().max_attempts = 9
    assert orchestrator.chains is chains


def test_no_concurrency_limit_is_no_limit() -> None:
    assert ConcurrencyConfig().as_options() == {}
    config = OrchestratorConfig(concurrency_config=ConcurrencyConfig())
    assert Orchestrator(config).process_sync(len, "a", "bc") == [1, 2]


def test_no_number_of_workers_is_one_for_each_processor() -> None:
    config = MultiprocessConfig(max_workers=None, backend=None)
    assert config.as_options() == {"mode": "process", "workers": os.cpu_count()}
