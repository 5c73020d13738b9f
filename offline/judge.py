"""Zero-shot judges: any vision model behind an OpenAI-compatible endpoint, asked which picture a group clicks more.

This is how Figure 3 compares general models with the GRM. They know nothing of the clicks.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any, Final

import httpx
import numpy as np

from generator.comparison import Comparison, Floats, Picture
from offline.endpoint import ask, chat_url
from offline.settings import EndpointSettings

_ANSWERS: Final = ("1", "2")


class JudgeAnswerError(RuntimeError):
    """An endpoint answered something that is no judgement."""

    def __init__(self, url: str, answer: str) -> None:
        super().__init__(
            f"{url} answered {answer!r}; allowed is an answer that begins with 1 or 2. The pair was not judged."
        )


class ZeroShotJudge:
    """A vision model that is asked about every pair (Chat Completions with two images).

    The chance is that of the answers "1" and "2" where the endpoint tells log-probabilities, else 0 or 1.

    Parameters
    ----------
    endpoint
        Where the model is.
    client
        What requests are sent by.
    """

    def __init__(self, endpoint: EndpointSettings, client: httpx.Client) -> None:
        self.name = f"judge {endpoint.model}"
        self._endpoint, self._client = endpoint, client

    def p_first_wins(self, comparisons: Sequence[Comparison]) -> Floats:
        """Return how probable the model finds it that the first picture is clicked more, (n,).

        Raises
        ------
        httpx.HTTPError
            If the endpoint cannot be reached or refuses.
        JudgeAnswerError
            If its answer is no judgement.
        """
        return np.array([self._judge(comparison) for comparison in comparisons], dtype=np.float64)

    def _judge(self, comparison: Comparison) -> float:
        question = (
            f"Two advertising pictures of the product {comparison.title!r} follow. Which one is clicked more often? "
            "Answer with the number 1 or 2 alone."
        )
        content = [{"type": "text", "text": question}, _image(comparison.first), _image(comparison.second)]
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 5,
        }
        choice = ask(self._client, self._endpoint, body)
        chances = _chances(choice)
        if chances is not None:
            return chances[0] / sum(chances)
        answer = str(choice["message"]["content"]).strip()
        if not answer.startswith(_ANSWERS):
            raise JudgeAnswerError(chat_url(self._endpoint), answer)
        return 1.0 if answer.startswith("1") else 0.0


def _chances(choice: dict[str, Any]) -> list[float] | None:
    """Return how probable the answers 1 and 2 were, or None where the endpoint does not say."""
    tokens = (choice.get("logprobs") or {}).get("content") or []
    if not tokens:
        return None
    chances = [0.0, 0.0]
    for candidate in tokens[0].get("top_logprobs") or []:
        if candidate["token"].strip() in _ANSWERS:
            chances[_ANSWERS.index(candidate["token"].strip())] += math.exp(candidate["logprob"])
    return chances if sum(chances) > 0.0 else None


def _image(picture: Picture) -> dict[str, Any]:
    buffer = BytesIO()
    picture.open().save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
