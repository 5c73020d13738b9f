"""Endpoint: a chat model behind OpenAI's protocol, asked one question at a time."""

from __future__ import annotations

from typing import Any

import httpx

from offline.settings import EndpointSettings


def chat_url(endpoint: EndpointSettings) -> str:
    """Return where an endpoint is asked; it has a URL."""
    return f"{str(endpoint.url).rstrip('/')}/chat/completions"


def ask(client: httpx.Client, endpoint: EndpointSettings, body: dict[str, Any]) -> dict[str, Any]:
    """Return the first choice of an endpoint's answer.

    Parameters
    ----------
    client
        Makes the request.
    endpoint
        Where the model is; it has a URL.
    body
        The request without the model's name: messages and options.

    Raises
    ------
    httpx.HTTPError
        The endpoint cannot be reached or refuses.
    ValueError, LookupError, TypeError
        It answers something else.
    """
    key = endpoint.api_key.get_secret_value()
    response = client.post(
        chat_url(endpoint),
        json={"model": endpoint.model, **body},
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=endpoint.timeout_s,
    )
    response.raise_for_status()
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice
