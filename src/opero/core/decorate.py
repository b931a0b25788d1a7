# this_file: src/opero/core/decorate.py
"""From a function and its options to the decorated function: wrapper, attributes, methods, `explain()`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opero.core.function import ClassMethod, FunctionInfo, Method
from opero.core.pipeline import Pipeline
from opero.core.wrapper import make_call, make_wrapper
from opero.errors import OperoUsageError
from opero.utils.lazy import NamedTuple
from opero.utils.parameters import NoDefault, stars, unwrap_partial
from opero.utils.secrets import looks_secret, mask_url
from opero.utils.units import format_seconds

if TYPE_CHECKING:
    from opero.core.call import Stage
    from opero.core.decorated import Explanation
    from opero.core.options import Options
    from opero.core.timeout import Timeout


BuildFunction = Callable[[Pipeline, str], Any]
"""Makes the function that users call from its pipeline and the decorator's name."""


def decorate(
    fn: Any, options: Options, *, by: str = "opero", build: BuildFunction | None = None
) -> Any:
    """Put the pipeline that `options` describe around `fn`.

    Args:
        fn: Function, method, class method, static method, partial or callable object.
        options: What is switched on.
        by: Name of the decorator, for messages.
        build: Makes the function that users call; None for the one that makes single calls.

    Returns:
        A plain function of the same kind and signature; for a function defined in a class body a
        descriptor around it.

    Raises:
        OperoUsageError: The options do not fit the function.
    """
    if isinstance(fn, classmethod | staticmethod):
        # The other order of decorators: what is inside is decorated, what is outside stays.
        info = FunctionInfo(fn.__func__)
        info.is_method = isinstance(fn, classmethod)
        inner = (build or build_function)(Pipeline(info, options), by)
        return ClassMethod(inner) if isinstance(fn, classmethod) else staticmethod(inner)
    if isinstance(fn, property):
        raise OperoUsageError(f"@{by} cannot decorate a property: write @property above @{by}.")
    return place_in_class(Pipeline(FunctionInfo(fn), options), by, build or build_function)


def place_in_class(pipeline: Pipeline, by: str, build: BuildFunction) -> Any:
    """Make what users call, and for a function from a class body the descriptor around it."""
    wrapper = build(pipeline, by)
    if not pipeline.info.in_class:
        return wrapper
    method = Method(wrapper)
    if pipeline.info.is_method is None and not pipeline.info.bound:

        def make_method() -> Any:
            pipeline.info.is_method = True
            made = place_in_class(pipeline, by, build)
            # Also what others have written on it, such as `abstractmethod`.
            vars(made.func).update({**vars(wrapper), **vars(made.func)})
            return made

        vars(method)["make_method"] = make_method
    return method


def with_changes(pipeline: Pipeline, by: str, changes: dict[str, Any]) -> Pipeline:
    """Return a pipeline of the same function with other options.

    Limiter, cache entries and counters are shared with the original, unless that very option changes.
    """
    options = pipeline.options.replace(by, **changes)
    return Pipeline(pipeline.info, options, origin=pipeline, changed=frozenset(changes))


def build_function(pipeline: Pipeline, by: str) -> Any:
    """Make the wrapper of a pipeline and hang on it what users ask a decorated function for."""
    wrapper: Any = make_wrapper(pipeline)

    def explanation() -> Explanation:
        """Describe what happens to a call, stage by stage."""
        return explain(pipeline)

    def with_options(**changes: Any) -> Any:
        """Return the same function with other options.

        Limiter, cache entries and counters are shared with the original, unless that very option
        changes.
        """
        return place_in_class(with_changes(pipeline, by, changes), by, build_function)

    wrapper.__opero__ = pipeline
    wrapper.call = make_call(pipeline)
    wrapper.explain = explanation
    wrapper.with_options = with_options
    wrapper.stats = pipeline.stats
    wrapper.options = pipeline.options
    wrapper.cache = pipeline.cache_handle()
    wrapper.rate_limit = pipeline.rate_limit and pipeline.rate_limit.limiter
    wrapper.concurrency = pipeline.concurrency and pipeline.concurrency.limit
    wrapper.circuit_breaker = pipeline.circuit and pipeline.circuit.breaker
    return wrapper


# --- explain(): the stages in their order, their numbers and the worst case -----------------------


def explain(pipeline: Pipeline, *, outside: tuple[tuple[str, str], ...] = ()) -> Explanation:
    """Describe what happens to a call, stage by stage, outermost first.

    Args:
        pipeline: The stages.
        outside: Names and lines of what stands around them.
    """
    from opero.core.decorated import Explanation

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
    for p in pipeline.info.parameters:
        text = stars(p) + p.name
        if p.default is not NoDefault:
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
        from opero.core.fallback import values_of

        parameter = pipeline.fallback.parameter
        per_value = parameter.default is NoDefault
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
