# this_file: examples/badday/chat.py
"""The chat-completions shape: answers, usage counts and error bodies as OpenAI's API words them.

Deterministic: a model always says the same to the same words, and one word is one token.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from badday.wire import Request

CHAT_PATH = "/v1/chat/completions"

# status: (type, code, message) of https://platform.openai.com/docs/guides/error-codes
_ERRORS: dict[int, tuple[str, str | None, str]] = {
    400: ("invalid_request_error", None, "The request is malformed."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided: {key}."),
    404: ("invalid_request_error", "model_not_found", "The model `{model}` does not exist."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for {model} on requests per min."),
    500: ("server_error", None, "The server had an error while processing your request."),
    503: ("server_error", None, "The engine is currently overloaded, please try again later."),
}


def error_body(status: int, request: Request | None = None, message: str = "") -> dict[str, Any]:
    """Return the JSON body of an error; the caller's key is shown by its last four letters only."""
    kind, code, text = _ERRORS.get(status, ("server_error", None, f"The answer is {status}."))
    model = str(request.json.get("model", request.path)) if request else ""
    key = f"***{request.key[-4:]}" if request and request.key else "none"
    text = message or text.format(model=model, key=key)
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


def refusal(request: Request) -> tuple[int, str] | None:
    """Return status and message for a request no model could answer, or None for a good one."""
    if request.method != "POST":
        return 405, "Use POST."
    if not isinstance(request.json.get("model"), str):
        return 400, "you must provide a model parameter"
    messages = request.json.get("messages")
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        return 400, "you must provide a messages parameter"
    if request.json.get("stream"):
        return 400, "this server does not stream"
    return None


def completion(request: Request, nth: int) -> dict[str, Any]:
    """Return the answer of the requested model to the last message, with usage counts."""
    model = request.json["model"]
    texts = [str(message.get("content", "")) for message in request.json["messages"]]
    reply = f"{model} has thought about: {texts[-1]}"
    prompt_tokens = sum(len(text.split()) for text in texts)
    completion_tokens = len(reply.split())
    return {
        "id": f"chatcmpl-{nth}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": reply, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
