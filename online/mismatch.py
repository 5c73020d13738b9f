"""Mismatches: a state that was built with other settings than those in use."""

from __future__ import annotations

from online.settings import UserSpace


class StateMismatchError(RuntimeError):
    """What the state holds is not what the settings describe."""


class WeightsMismatchError(StateMismatchError):
    """The weights in the state belong to another model."""

    def __init__(self, found: int, wanted: int) -> None:
        super().__init__(
            f"the state holds a model of {found} parameters, the settings describe one of {wanted}: nothing was "
            "learnt. Set online.model, online.attributes and online.encoders to what the state was built with, or "
            "start with a new state.path."
        )


class FeatureWidthError(StateMismatchError):
    """Features in the state are of another encoder than the settings name."""

    def __init__(self, found: int, wanted: int) -> None:
        super().__init__(
            f"the state holds features of width {found}, the encoders of the settings give {wanted}: nothing was "
            "learnt. Set online.encoders to what the state was built with, or start with a new state.path."
        )


class SpaceMismatchError(StateMismatchError):
    """The groups in the state lie in another space than the settings name."""

    def __init__(self, found: str, wanted: str) -> None:
        super().__init__(
            f"the state's users are grouped by {found}, online.groups.space is {wanted!r}: no user was grouped. "
            f"Set online.groups.space to {found!r}, or start with a new state.path."
        )


class LedgerKeyError(StateMismatchError):
    """The users in the state's ledger were hashed with another key than the settings hold."""

    def __init__(self) -> None:
        super().__init__(
            "the state's ledger was written with another online.ledger.hash_key: nobody in it could be found again, so "
            "nothing was consumed. Set the key that it was written with, or let the ledger go by running once with "
            "online.ledger.retention_s = 0."
        )


def check_space(found: bytes | None, wanted: UserSpace) -> None:
    """Raise `SpaceMismatchError` where a state has groups, and they are of another space than ``wanted``."""
    if found is not None and found.decode() != wanted:
        raise SpaceMismatchError(found.decode(), wanted)
