"""Settings of the streams: what is impossible is refused with the key."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from streams.attributes import TABLE_4
from streams.settings import FieldMapSettings, JoinSettings, StreamSettings, TopicSettings


@pytest.mark.parametrize(
    ("model", "values", "key"),
    [
        (StreamSettings, {"bootstrap": "x"}, "bootstrap"),
        (StreamSettings, {"n_partitions": 0}, "n_partitions"),
        (StreamSettings, {"batch_events": 0}, "batch_events"),
        (StreamSettings, {"batch_events": 100_001}, "batch_events"),
        (StreamSettings, {"linger_ms": -1}, "linger_ms"),
        (StreamSettings, {"consumer_group": ""}, "consumer_group"),
        (StreamSettings, {"join": {"label_window_s": 0}}, "label_window_s"),
        (StreamSettings, {"topics": {"impresions": "t"}}, "impresions"),
        (JoinSettings, {"click_wait_s": "long"}, "click_wait_s"),
        (JoinSettings, {"allowed_lateness_s": -5}, "allowed_lateness_s"),
        (JoinSettings, {"attribution_window_s": 0}, "attribution_window_s"),
        (FieldMapSettings, {"impressions": {"user_id": 3}}, "user_id"),
        (FieldMapSettings, {"users": {}}, "users"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(model: type[BaseModel], values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        model(**values)


def models(model: type[BaseModel]) -> list[type[BaseModel]]:
    nested = [field.annotation for field in model.model_fields.values()]
    return [model, *(each for n in nested if isinstance(n, type) and issubclass(n, BaseModel) for each in models(n))]


def test_every_setting_is_described() -> None:
    described = {
        (model.__name__, name): field.description
        for model in models(StreamSettings)
        for name, field in model.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    }
    assert len(described) > 15
    assert [key for key, text in described.items() if not text] == []


def test_topics_have_different_names() -> None:
    names = TopicSettings().model_dump().values()
    assert len(set(names)) == len(names)


def test_table_4_has_twenty_attributes_with_different_values() -> None:
    assert len(TABLE_4) == 20
    for name, values in TABLE_4.items():
        assert len(set(values)) == len(values) >= 2, name
