# this_file: src/opero/core/explain.py
"""`explain()`: the stages around a function in their order, their numbers and the worst case."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, NamedTuple

from opero.core.call import Explanation
from opero.core.fallback import values_of
from opero.core.function import stars, unwrap_partial
from opero.utils.secrets import looks_secret, mask_url
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.core.call import Stage
    from opero.core.pipeline import Pipeline
    from opero.core.timeout import Timeout

__all__ = ["explain"]


def explain(pipeline: Pipeline, *, outside: tuple[tuple[str, str], ...] = ()) -> Explanation:
    """Describe what happens to a call, stage by stage, outermost first.

    Args:
        pipeline: The stages.
        outside: Names and lines of what stands around them.
    """
    info = pipeline.info
    kind = {"async_generator": "async generator"}.get(info.kind, info.kind)
    parts: list[Stage | Timeout] = [*pipeline.stages]
    if pipeline.timeout is not None:
        parts.append(pipeline.timeout)
    lines = [*outside, *((part.name, text) for part in parts if (text := part.describe()))]
    width = max((len(name) for name, _ in lines), default=0)
    rows = [f"├─ {name:<{max(width, 10)}}  {text}" for name, text in lines]
    head = f"{_signature(pipeline)}  [{kind}]"
    return Explanation("\n".join([head, *rows, f"└─ {info.name}()  {_worst_case(pipeline)}"]))


def _signature(pipeline: Pipeline) -> str:
    """The call, with defaults that are short and no secret."""
    shown = []
    for p in pipeline.info.declared.parameters.values():
        text = stars(p) + p.name
        if p.default is not inspect.Parameter.empty:
            secret = looks_secret(p.name, tuple(pipeline.options.secret))
            default = mask_url(repr(p.default)) if _is_plain(p.default) else "…"
            text += "=…" if secret or len(default) > 40 else f"={default}"
        shown.append(text)
    return f"{pipeline.info.name}({', '.join(shown)})"


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or type(value) in (str, int, float, bool)


class _Worst(NamedTuple):
    """The longest way that a call can take.

    Attributes:
        calls: Real calls of the innermost function.
        per_value: Whether that is for each of the values that the caller gives.
        endless: Whether a given `stop` decides instead.
        low, high: Seconds of pauses, nan if unknown.
    """

    calls: int
    per_value: bool
    endless: bool
    low: float
    high: float


def _worst(pipeline: Pipeline) -> _Worst:
    policy = pipeline.retry.policy
    attempts = 1 + policy.retries if policy else 1
    values, per_value = 1, False
    if pipeline.fallback is not None:
        parameter = pipeline.fallback.parameter
        per_value = parameter.default is inspect.Parameter.empty
        values = 1 if per_value else len(values_of(parameter.default, parameter.name))
    low, high = policy.pauses() if policy else (0.0, 0.0)
    if policy and (policy.wait or policy.stop):
        low = high = math.nan
    endless = bool(policy and policy.stop)
    worst = _Worst(attempts * values, per_value, endless, low, high)
    inner = getattr(unwrap_partial(pipeline.info.fn), "__opero__", None)
    if inner is not None:
        worst = _nested(worst, _worst(inner))
    if pipeline.deadline is None:
        return worst
    # No pause is begun that would outlast the deadline, so all of them together do not either.
    within = pipeline.deadline.seconds
    return worst._replace(low=min(worst.low, within), high=min(worst.high, within))


def _nested(outer: _Worst, inner: _Worst) -> _Worst:
    """Multiply: each call of the outer pipeline is a whole walk through the inner one."""
    unknown = math.nan if outer.per_value else 0.0
    return _Worst(
        calls=outer.calls * inner.calls,
        per_value=outer.per_value or inner.per_value,
        endless=outer.endless or inner.endless,
        low=outer.low + outer.calls * inner.low + unknown * inner.high,
        high=outer.high + outer.calls * inner.high + unknown * inner.high,
    )


def _worst_case(pipeline: Pipeline) -> str:
    worst = _worst(pipeline)
    calls = f"{worst.calls} call{'s' * (worst.calls != 1)}"
    if worst.endless:
        calls = "calls until the given stop"
    elif worst.per_value:
        calls = f"{worst.calls} × values calls"
    pauses = ""
    if worst.high > 0 and not worst.endless:
        low, high = (format_seconds(round(s, 3)) for s in (worst.low, worst.high))
        pauses = f" and {low} of pauses" if low == high else f" and {low} to {high} of pauses"
    end = "" if calls == "1 call" else ", then the last error"
    return f"worst case {calls}{pauses}{end}"
