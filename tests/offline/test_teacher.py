from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from generator.prompt import UNNAMED_CAPTION, VOCABULARY, is_well_formed
from offline.settings import TeacherSettings
from offline.teacher import (
    SETTINGS_OF_PRODUCTS,
    TASTES,
    Brief,
    EndpointTeacher,
    GrammarTeacher,
    TeacherFailed,
    suitability,
)
from state.records import ProfileTrait
from streams.attributes import TABLE_4

STUDENT = {"age": "18-20", "target_group": "student", "gender": "male", "color": "black"}
PENSIONER = {"age": "over 70", "target_group": "pensioner", "gender": "female", "color": "brown"}


def brief(typical: dict[str, str], *, title: str = "A chair", **others: Any) -> Brief:
    return Brief("p1", title, others.pop("category", None), typical, **others)


def test_the_grammar_names_known_words_and_values_alone() -> None:
    words = {word for allowed in VOCABULARY.values() for word in allowed}
    for name, values, spoken in TASTES:
        assert set(values) <= set(TABLE_4[name])
        assert set(spoken) <= words
    for _, scenes in SETTINGS_OF_PRODUCTS:
        assert set(scenes) <= set(VOCABULARY["scene"])


def test_every_prompt_is_well_formed_and_names_no_product() -> None:
    teacher = GrammarTeacher(temperature=1.0, seed=0)
    for prompt in teacher.write(brief(STUDENT, title="Chair, red <image> of \n oak"), 20):
        assert is_well_formed(prompt.text)
        assert prompt.caption == UNNAMED_CAPTION
        assert prompt.named("Oak chair").text == prompt.text.replace(UNNAMED_CAPTION, "Oak chair")


def test_prompts_are_the_same_for_the_same_brief_and_differ_by_draw_seed_and_group() -> None:
    teacher = GrammarTeacher(temperature=1.0, seed=0)
    prompts = teacher.write(brief(STUDENT), 8)
    assert prompts == GrammarTeacher(temperature=1.0, seed=0).write(brief(STUDENT), 8)
    assert prompts != GrammarTeacher(temperature=1.0, seed=1).write(brief(STUDENT), 8)
    assert prompts != teacher.write(brief(PENSIONER), 8)
    assert len(set(prompts)) > 4


def test_at_a_low_temperature_the_words_are_those_that_suit_best() -> None:
    [student] = GrammarTeacher(temperature=0.01, seed=0).write(brief(STUDENT), 1)
    [pensioner] = GrammarTeacher(temperature=0.01, seed=0).write(brief(PENSIONER), 1)
    assert (student.scene, student.palette) == ("city street at night", "neon")
    assert (pensioner.palette, pensioner.light) == ("earthy", "golden hour")


def test_what_sets_a_group_apart_speaks_louder_than_what_is_common() -> None:
    apart = ProfileTrait("age", "over 70", 0.3, 2.5)
    assert suitability(brief(STUDENT))["neon"] == 2.0
    assert "earthy" not in suitability(brief(STUDENT))
    assert suitability(brief(STUDENT, distinctive=[apart]))["earthy"] == 2.5


@pytest.mark.parametrize(
    ("title", "category", "scene"), [("A desk lamp", None, "photo studio"), ("Thing", "kitchen", "modern kitchen")]
)
def test_products_have_their_usual_scenes(title: str, category: str | None, scene: str) -> None:
    assert suitability(brief({}, title=title, category=category))[scene] == 2.0
    assert scene not in suitability(brief({}, title="Thing"))


@contextmanager
def endpoint(status: int, answer: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve one answer to every question; yield the base URL, and the requests as they come."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            payload = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args: object) -> None:
            """Write nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", seen
        finally:
            server.shutdown()
            thread.join()


def said(content: object) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


def test_an_endpoints_prompt_is_learnt_in_our_form() -> None:
    with endpoint(200, said("A dreamy beach, pastel colours, with leaves")) as (url, seen), httpx.Client() as client:
        settings = TeacherSettings(url=url, model="any", api_key=SecretStr("secret"))
        prompts = EndpointTeacher(settings, client).write(brief(STUDENT), 2)
    assert [(prompt.scene, prompt.palette, prompt.light, prompt.prop) for prompt in prompts] == [
        ("sunlit beach", "pastel", "dreamy backlight", "green plants")
    ] * 2
    assert all(prompt.caption == UNNAMED_CAPTION for prompt in prompts)
    assert [request["seed"] for request in seen] == [0, 1]
    assert {(request["path"], request["key"], request["model"]) for request in seen} == {
        ("/v1/chat/completions", "Bearer secret", "any")
    }
    question = seen[0]["messages"][0]["content"]
    assert "target_group student" in question
    assert "A chair" in question


@pytest.mark.parametrize(
    ("status", "answer"),
    [(500, said("fine")), (200, {"error": "no"}), (200, said("   ")), (200, said(None))],
    ids=["refused", "not the protocol", "nothing written", "no text"],
)
def test_a_teacher_that_fails_says_so(status: int, answer: Any) -> None:
    with endpoint(status, answer) as (url, _), httpx.Client() as client:
        teacher = EndpointTeacher(TeacherSettings(url=url), client)
        with pytest.raises(TeacherFailed, match=r"chat/completions wrote no prompt"):
            teacher.write(brief(STUDENT), 1)
