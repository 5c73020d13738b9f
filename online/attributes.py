"""Attributes: a user's values as small integer codes.

Code 0 is a missing value and code 1 a value that is not in the list, each with an embedding of its
own. An attribute without a list of values is hashed into buckets.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from online.settings import AttributeSettings

MISSING, UNKNOWN = 0, 1
N_RESERVED = 2
MAX_CODES = 256


class AttributeSchemaError(ValueError):
    """The attributes' settings cannot be used."""


class AttributeSchema:
    """The attributes in their fixed order, with the codes of their values."""

    def __init__(self, settings: AttributeSettings) -> None:
        if both := sorted(set(settings.values) & set(settings.buckets)):
            raise AttributeSchemaError(
                f"online.attributes: {', '.join(both)} has both values and buckets; an attribute has one of them."
            )
        self.names: tuple[str, ...] = (*settings.values, *settings.buckets)
        if not self.names:
            raise AttributeSchemaError("online.attributes: no attribute is named; grouping users needs at least one.")
        self._values = dict(settings.values)
        self._codes = [
            {value: code for code, value in enumerate(settings.values.get(name, ()), N_RESERVED)} for name in self.names
        ]
        self._n_buckets = [settings.buckets.get(name, 0) for name in self.names]
        self.cardinalities: tuple[int, ...] = tuple(
            N_RESERVED + (len(codes) or n_buckets)
            for codes, n_buckets in zip(self._codes, self._n_buckets, strict=True)
        )
        for name, cardinality in zip(self.names, self.cardinalities, strict=True):
            if not N_RESERVED < cardinality <= MAX_CODES:
                raise AttributeSchemaError(
                    f"online.attributes: {name!r} has {cardinality - N_RESERVED} values; "
                    f"allowed are 1 to {MAX_CODES - N_RESERVED}. Use online.attributes.buckets for more."
                )
        self._fields = list(zip(self.names, self._codes, self._n_buckets, strict=True))

    def encode(self, attributes: Mapping[str, str]) -> bytes:
        """Return the codes of a user's values, one byte an attribute; attributes not in the schema are ignored."""
        codes = bytearray(len(self._fields))
        for position, (name, values, n_buckets) in enumerate(self._fields):
            value = attributes.get(name)
            if value is None:
                continue
            if n_buckets:
                codes[position] = N_RESERVED + zlib.crc32(value.encode()) % n_buckets
            else:
                codes[position] = values.get(value, UNKNOWN)
        return bytes(codes)

    def encode_many(self, users: Sequence[Mapping[str, str]]) -> npt.NDArray[np.uint8]:
        """Return the codes of several users, (B, N)."""
        codes = b"".join(map(self.encode, users))
        return np.frombuffer(codes, np.uint8).reshape(len(users), len(self.names))

    def word(self, position: int, code: int) -> str | None:
        """Return the value of a code in words; None where there is none (missing, unknown, hashed)."""
        values = self._values.get(self.names[position])
        if values is None or code < N_RESERVED:
            return None
        return values[code - N_RESERVED]
