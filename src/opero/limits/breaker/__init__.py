# this_file: src/opero/limits/breaker/__init__.py
"""The circuit breaker: stops calling a service that keeps failing.

What it decides is pure: time and randomness are handed in.

    rules      the options, and what follows from them
    tally      what is counted while it is closed
    machine    the states and what leads from one to the other

What users and stages hold is in the rest.

    permit     leave to make a call, and the way to tell how it ended
    news       who hears of the changes
    turnstile  the machine with a lock and a clock: permits out, outcomes in
    parts      how many breakers of single fallback values are kept
    registry   where breakers are met again: by name, or out of a pickle
    shared     `CircuitBreaker`: all of it, with its options and the verbs by hand
"""

from __future__ import annotations

from opero.limits.breaker.machine import CircuitState, CircuitStats
from opero.limits.breaker.permit import FREE, Permit
from opero.limits.breaker.shared import CircuitBreaker

__all__ = ["FREE", "CircuitBreaker", "CircuitState", "CircuitStats", "Permit"]
