"""Attributes: values as codes, with places of their own for what is missing and what is new."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online.attributes import MISSING, N_RESERVED, UNKNOWN, AttributeSchema, AttributeSchemaError
from online.settings import AttributeSettings
from streams.attributes import TABLE_4

SETTINGS = AttributeSettings(values={"gender": ("female", "male"), "tier": ("1", "2", "3")}, buckets={"city": 7})
SCHEMA = AttributeSchema(SETTINGS)


@pytest.mark.parametrize(
    ("user", "codes"),
    [
        ({}, [MISSING, MISSING, MISSING]),
        ({"gender": "female", "tier": "3"}, [2, 4, MISSING]),
        ({"gender": "male", "tier": "1", "unheard_of": "x"}, [3, 2, MISSING]),
        ({"gender": "other", "tier": ""}, [UNKNOWN, UNKNOWN, MISSING]),
        ({"gender": "Female"}, [UNKNOWN, MISSING, MISSING]),
    ],
)
def test_codes(user: dict[str, str], codes: list[int]) -> None:
    assert list(SCHEMA.encode(user)) == codes


def test_names_and_cardinalities() -> None:
    assert SCHEMA.names == ("gender", "tier", "city")
    assert SCHEMA.cardinalities == (4, 5, 9)
    default = AttributeSchema(AttributeSettings())
    assert default.names == tuple(TABLE_4)
    assert default.cardinalities == tuple(N_RESERVED + len(values) for values in TABLE_4.values())


def test_every_value_of_table_4_has_its_own_code_and_its_word_back() -> None:
    schema = AttributeSchema(AttributeSettings())
    for position, (name, values) in enumerate(TABLE_4.items()):
        codes = [schema.encode({name: value})[position] for value in values]
        assert codes == list(range(N_RESERVED, N_RESERVED + len(values)))
        assert [schema.word(position, code) for code in codes] == list(values)


@pytest.mark.parametrize("code", [MISSING, UNKNOWN])
def test_reserved_codes_have_no_word(code: int) -> None:
    assert SCHEMA.word(0, code) is None
    assert SCHEMA.word(2, 5) is None  # hashed: nobody knows the word


user = st.dictionaries(st.sampled_from(["gender", "tier", "city", "other"]), st.text(max_size=5), max_size=4)


@given(st.lists(user, max_size=6))
def test_many_users_are_encoded_as_each_alone_and_within_the_cardinalities(users: list[dict[str, str]]) -> None:
    codes = SCHEMA.encode_many(users)
    assert codes.shape == (len(users), 3)
    assert codes.dtype == np.uint8
    assert [bytes(row) for row in codes] == [SCHEMA.encode(each) for each in users]
    assert (codes < np.array(SCHEMA.cardinalities)).all()
    for row, each in zip(codes.tolist(), users, strict=True):
        assert [code == MISSING for code in row] == [name not in each for name in SCHEMA.names]


def test_hashed_values_spread_over_all_buckets_and_stay_where_they_are() -> None:
    found = [SCHEMA.encode({"city": f"city {n}"})[2] for n in range(200)]
    assert set(found) == set(range(N_RESERVED, N_RESERVED + 7))
    assert found == [AttributeSchema(SETTINGS).encode({"city": f"city {n}"})[2] for n in range(200)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (AttributeSettings(values={"a": ("x",)}, buckets={"a": 3}), "a has both values and buckets"),
        (AttributeSettings(values={}), "no attribute is named"),
        (AttributeSettings(values={"a": ()}), "'a' has 0 values; allowed are 1 to 254"),
        (AttributeSettings(values={}, buckets={"a": 255}), "'a' has 255 values"),
        (AttributeSettings(values={"a": tuple(map(str, range(255)))}), "buckets for more"),
    ],
)
def test_impossible_schemas_are_refused(settings: AttributeSettings, said: str) -> None:
    with pytest.raises(AttributeSchemaError, match=said):
        AttributeSchema(settings)


def test_the_largest_schemas_fit_a_byte() -> None:
    schema = AttributeSchema(AttributeSettings(values={"a": tuple(map(str, range(254)))}, buckets={"b": 254}))
    assert list(schema.encode({"a": "253"})) == [255, 0]
    assert schema.cardinalities == (256, 256)
