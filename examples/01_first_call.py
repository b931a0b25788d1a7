#!/usr/bin/env python3
# this_file: examples/01_first_call.py
"""The first call: a function that fails twice, and what `@opero` makes of it.

Needs no network; `flaky` stands in for a service that fails a few times and then answers.
"""

from __future__ import annotations

from opero import failures, opero
from opero.testing import flaky

# 1. Without opero, the first failure is the caller's problem.
service = flaky("22 °C and sunny", failures=2)
try:
    service()
except ConnectionError as error:
    print(f"without opero: {type(error).__name__}: {error}")

# 2. With it, the call is made again after a short pause. Nothing else changes.
service = flaky("22 °C and sunny", failures=2)


@opero
def weather(city: str) -> str:
    """Return the weather of a city."""
    return f"{city}: {service()}"


print(f"with opero:    {weather('Lisbon')}")
print(f"once more:     {weather('Lisbon')} (from the cache)")
print(f"so far:        {weather.stats}")

# 3. `call` returns a receipt instead of the bare value.
service = flaky("17 °C and rain", failures=1)
receipt = weather.call("Bergen")
print(f"a receipt:     {receipt}")
print(f"               the value is {receipt.value!r}, after {receipt.calls} calls")

# 4. An error that no retry helps against is the function's own.
service = flaky("no answer", failures=99, error=TimeoutError)
try:
    weather("Atlantis")
except TimeoutError as error:
    print(
        f"given up:      {type(error).__name__}, one of {len(failures(error))} failures; its note:"
    )
    for note in error.__notes__:
        print(f"               {note}".replace("\n", f"\n{' ' * 15}"))

# 5. What will happen can be read before it does.
print("\nexplain():")
print(weather.explain())
