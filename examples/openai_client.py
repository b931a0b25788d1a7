#!/usr/bin/env python3
# this_file: examples/openai_client.py
"""The `openai` client under `@opero`, against a local server that speaks chat completions.

The client's own retries are off (`max_retries=0`): two retry loops inside each other multiply.
Needs `pip install openai`; talks to no one but the local server.

    python examples/openai_client.py
"""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from typing import Any

import openai
from server import BadDayServer
from terminal import Claims, heading, indented, say, table, use_utf8

from opero import failures, opero

SCRIPT = """
/v1/chat/completions   key=sk-expired-0001   401     # a revoked key
/v1/chat/completions   key=sk-spent-0002     429     # a key without credit
/v1/chat/completions   model=gpt-4           429     # rate-limited all day
/v1/chat/completions   model=gpt-4o          503     # overloaded all day
/v1/chat/completions   200@0.02
"""
KEYS = ("sk-expired-0001", "sk-spent-0002", "sk-live-0003")
TRANSIENT = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)

server = BadDayServer(SCRIPT)


def client(api_key: str) -> openai.OpenAI:
    """Make a client for one key, without retries of its own."""
    return openai.OpenAI(
        api_key=api_key,
        base_url=f"{server.url}/v1",
        max_retries=0,
        timeout=2,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )


# --- the functions --------------------------------------------------------------------------------


@opero(arg_fallback="model", retries=2, min_delay="20ms", retry_on=TRANSIENT)
def ask(prompt: str, model: str | tuple[str, ...] = ("gpt-4", "gpt-4o", "gpt-3.5-turbo")) -> str:
    """Ask the first model that answers."""
    with client(KEYS[-1]) as api:
        answer = api.chat.completions.create(
            model=str(model), messages=[{"role": "user", "content": prompt}]
        )
    return answer.choices[0].message.content or ""


@opero(arg_fallback="api_key", retries=1, min_delay="20ms", retry_on=TRANSIENT)
def ask_with(prompt: str, api_key: str | tuple[str, ...]) -> str:
    """Ask with the first key that is accepted; opero never shows the keys."""
    with client(str(api_key)) as api:
        answer = api.chat.completions.create(
            model="gpt-3.5-turbo", messages=[{"role": "user", "content": prompt}]
        )
    return answer.choices[0].message.content or ""


async def ask_many(prompts: list[str]) -> list[Any]:
    """Ask the async client many things at once; equal questions are asked once."""
    api = openai.AsyncOpenAI(
        api_key=KEYS[-1],
        base_url=f"{server.url}/v1",
        max_retries=0,
        timeout=2,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    )

    @opero(arg_fallback="model", min_delay="20ms", retry_on=TRANSIENT, rate_limit=100)
    async def ask_async(
        prompt: str, model: str | tuple[str, ...] = ("gpt-4", "gpt-3.5-turbo")
    ) -> str:
        answer = await api.chat.completions.create(
            model=str(model), messages=[{"role": "user", "content": prompt}]
        )
        return answer.choices[0].message.content or ""

    async with api:
        return list(await asyncio.gather(*(ask_async.call(prompt) for prompt in prompts)))


# --- what happens ---------------------------------------------------------------------------------


def main() -> int:
    """Run the example; return 0 if every claim holds."""
    use_utf8()
    started = time.perf_counter()
    claims = Claims()
    print("The openai client on a bad day; the local server plays this script")
    indented(SCRIPT)
    heading("explain()")
    indented(str(ask.explain()))
    print()
    indented(str(ask_with.explain()))

    prompts = ["Name a river.", "Name a lake.", "Name a river.", "Name a sea.", "Name a lake."]
    with server:
        by_model = ask.call("Why is the sky blue?")
        by_model_again = ask.call("Why is the sky blue?")
        by_key = ask_with.call("Why is the sea salt?", KEYS)
        many = asyncio.run(ask_many(prompts))
        books = server.report()
        one_model = error_of(ask, "Why is grass green?", model="gpt-4")
        two_models = error_of(ask, "Why is grass green?", model=("gpt-4o", "gpt-4"))
        no_key = error_of(ask_with, "Why is grass green?", KEYS[:2])

    heading("What happened to each call")
    lines: dict[str, Any] = {
        "ask('Why is the sky blue?')": by_model,
        "ask('Why is the sky blue?') again": by_model_again,
        "ask_with('Why is the sea salt?', KEYS)": by_key,
        **{f"ask_async({prompt!r}), {nth}": many[nth - 1] for nth, prompt in enumerate(prompts, 1)},
    }
    table(
        ["call", "used", "source", "calls", "seconds"],
        [
            [
                name,
                receipt.label or "",
                receipt.source,
                str(receipt.calls),
                f"{receipt.seconds:.2f}",
            ]
            for name, receipt in lines.items()
        ],
        numbers=["calls", "seconds"],
    )
    spent = books["usage"]["gpt-3.5-turbo"]
    say(f"The server answered {spent['requests']} times, {spent['total_tokens']} tokens in all.")

    heading("When nothing helps")
    for error in (two_models, no_key):
        indented(f"{type(error).__module__}.{type(error).__name__}: {error}")
        indented("\n".join(getattr(error, "__notes__", [])))
        print()

    heading("Claims")
    claims.check(
        "ask() got past a rate-limited and an overloaded model to the third",
        by_model.fallback == "gpt-3.5-turbo" and by_model.calls == 3,
    )
    claims.check(
        "the second ask() was a cache hit, and 5 questions, 3 of them different, were answered"
        " 3 times: the server was paid for 5 answers in all",
        by_model_again.source == "hit" and spent["requests"] == 5,
    )
    claims.check(
        "ask_with() got past a revoked and a spent key to the third",
        by_key.fallback == KEYS[2] and by_key.calls == 3,
    )
    claims.check(
        "a RateLimitError stays openai.RateLimitError, with one model and with two",
        type(one_model) is type(two_models) is openai.RateLimitError
        and [type(error) for error in failures(two_models)]
        == [openai.InternalServerError, openai.RateLimitError] * 3,
    )
    shown = [str(ask_with.explain()), repr(by_key), repr(ask_with), repr(ask_with.stats)]
    shown += [repr(ask_with.options), str(no_key), *getattr(no_key, "__notes__", [])]
    shown += traceback.format_exception(no_key)
    claims.check(
        "no key stands in explain(), a receipt, the stats, a note or a traceback",
        not any(key in text for key in KEYS for text in shown),
    )
    return claims.finish(time.perf_counter() - started)


def error_of(function: Any, *args: Any, **kwargs: Any) -> Exception:
    """Make a call that is bound to fail and return its exception."""
    try:
        function(*args, **kwargs)
    except openai.APIError as error:
        return error
    raise AssertionError(f"{function.__name__}() should have failed")


if __name__ == "__main__":
    sys.exit(main())
