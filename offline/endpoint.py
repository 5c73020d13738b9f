"""Endpoint: a chat model behind OpenAI's protocol, asked one question at a time."""

from __future__ import annotations

from typing import Any

import httpx


def chat_url(base_url: str) -> str:
    """Return where an endpoint of a base URL is asked."""
    return f"{base_url.rstrip('/')}/chat/completions"


def ask(client: httpx.Client, url: str, body: dict[str, Any], *, key: str | None, timeout_s: float) -> dict[str, Any]:
    """Return the first choice of an endpoint's answer.

    Parameters
    ----------
    client
        Makes the request.
    url
        See `chat_url`.
    body
        The request: model, messages and options.
    key
        Bearer token; none or empty: none is sent.
    timeout_s
        Longest wait.

    Raises
    ------
    httpx.HTTPError
        The endpoint cannot be reached or refuses.
    ValueError, LookupError, TypeError
        It answers something else.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = client.post(url, json=body, headers=headers, timeout=timeout_s)
    response.raise_for_status()
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice
