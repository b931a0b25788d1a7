#!/usr/bin/env python3
# this_file: examples/04_cache_rules.py
"""What the cache takes for the same call, what it keeps, and how to reach into it."""

from __future__ import annotations

from typing import Any

from opero import opero

made: list[str] = []


@opero(cache_ttl="10m")
def rate(amount: float, currency: str = "EUR") -> float | None:
    """Convert an amount, for euros only."""
    made.append(f"rate({amount!r}, {currency!r})")
    return amount * 2 if currency == "EUR" else None


def show(text: str) -> None:
    """Print a line and the real calls made since the last one."""
    print(f"{text:<58} {', '.join(made) or 'no call'}")
    made.clear()


# 1. A key is made from the bound arguments: how they were written does not matter, their type does.
rate(1.0), rate(amount=1.0), rate(1.0, "EUR")
show("rate(1.0), rate(amount=1.0), rate(1.0, 'EUR'):")
rate(1)
show("rate(1): 1 and 1.0 are equal but not the same")

# 2. None is a result like any other.
rate(1.0, "XYZ"), rate(1.0, "XYZ")
show("rate(1.0, 'XYZ') twice: None is a hit")


# 3. What you do to a result stays with you.
@opero
def basket(user: str) -> list[str]:
    """Return a fresh list."""
    made.append(f"basket({user!r})")
    return ["apple"]


basket("ada").append("worm")
show(f"basket('ada') after appending to the last: {basket('ada')}")


# 4. Failures are never cached, and `cache_if` refuses or shortens what should not last.
@opero(arg_fallback="source", retries=0, cache_if=lambda _, receipt: receipt.fallback == "live")
def price(item: str, source: str | tuple[str, ...] = ("live", "guess")) -> str:
    """Return a price; the live source is down."""
    made.append(f"{source} price({item!r})")
    if source == "live":
        raise ConnectionError("down")
    return "about 3"


price("tea")
show("a guess is served ...")
price("tea")
show("... but not kept, so the live price gets another chance:")


# 5. Parameters without content, such as clients and locks, are left out by name.
@opero(cache_ignore=["session"])
def fetch(url: str, session: Any) -> str:
    """Fetch a page in some session."""
    made.append(f"fetch({url!r})")
    return f"<{url}>"


fetch("/a", object()), fetch("/a", object())
show("fetch('/a', session) with two sessions:")

# 6. `.cache` reaches one entry, or all of them.
rate.cache.invalidate(1.0)
rate(1.0), rate(1)
show("after rate.cache.invalidate(1.0):")
rate.cache.refresh(1)
show("rate.cache.refresh(1):")
rate.cache.clear()
rate(1.0), rate(1)
show("after rate.cache.clear():")
print(f"\n{rate.cache.info()}\n{rate.stats}")
