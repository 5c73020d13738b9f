"""The simulated users: the attributes of Table 4, correlated through twelve personas.

A persona says which values its people tend to have. A user takes each value from the persona's
tendency with a chance of 85% and from everybody's mixture otherwise, so no value gives a persona away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from streams.attributes import TABLE_4

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = dict(TABLE_4)
"""Attribute name to its values, in the paper's order (Table 4)."""

_P_OF_PERSONA: Final = 0.85


@dataclass(frozen=True)
class Persona:
    """A kind of person: its share of the users and its tendencies.

    ``ordered`` gives an ordered attribute's centre and spread, in steps between its values; ``weights``
    gives unordered attributes' relative weights (values not named get a twentieth of the mean weight).
    Attributes that are named in neither follow everybody's mixture.
    """

    name: str
    share: float
    ordered: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def _persona(
    name: str,
    share: float,
    *,
    age: tuple[float, float],
    power: float,
    city: float,
    promotions: float,
    female: float,
    children: tuple[float, float] | None,
    married: float,
    work: Mapping[str, float],
    target: Mapping[str, float],
    education: float,
    owns: float,
    ios: float,
    activity: float,
    colours: tuple[str, ...],
) -> Persona:
    """Fill a persona in from a few traits; the other attributes follow from them."""
    yes_car, yes_house = min(0.95, owns), min(0.95, 0.9 * owns + 0.05)
    child_weights: dict[str, float] = {"no children": 1.0}
    if children is not None:
        centre, p_none = children
        names = ATTRIBUTES["child_age"][1:]
        near = np.exp(-0.5 * ((np.arange(len(names)) - centre) / 1.6) ** 2)
        child_weights = {v: float(w) for v, w in zip(names, (1 - p_none) * near / near.sum(), strict=True)}
        child_weights["no children"] = p_none
    return Persona(
        name,
        share,
        ordered={
            "age": age,
            "purchase_power": (power, 0.8),
            "resident_city_level": (city, 0.9),
            "promotions_sensitive_level": (promotions, 0.9),
            "education": (education, 0.8),
            "user_active": (activity, 0.6),
            "member_level": (3.6 - 0.7 * power + 0.4 * activity, 0.9),
            "customer_points": (1.0 + activity + 0.3 * (2 - power), 1.0),
            "per_month_order_num": (1.0 + 1.3 * activity, 1.1),
        },
        weights={
            "gender": {"female": female, "male": 1 - female},
            "marriage": {"married": married, "single": 0.85 * (1 - married), "divorced or widowed": 0.15},
            "child_age": child_weights,
            "profession": work,
            "target_group": target,
            "has_car": {"yes": yes_car, "no": 1 - yes_car},
            "has_house": {"yes": yes_house, "no": 1 - yes_house},
            "os_plant": {"ios": ios, "android": 0.96 - ios, "other": 0.04},
            "is_vip": {"yes": 0.15 + 0.2 * activity, "no": 0.85 - 0.2 * activity},
            "is_impulse_purchase_user": {"yes": 0.15 + 0.14 * promotions, "no": 0.85 - 0.14 * promotions},
            "color": dict.fromkeys(colours, 1.0),
        },
    )


PERSONAS: Final[tuple[Persona, ...]] = (
    _persona("student", 0.11, age=(1.4, 0.8), power=3.4, city=1.4, promotions=3.2, female=0.5, children=None,
             married=0.02, work={"student": 1}, target={"student": 1}, education=3.6, owns=0.03, ios=0.45,
             activity=1.4, colours=("black", "white", "pink", "purple", "turquoise")),
    _persona("city professional", 0.11, age=(3.6, 1.0), power=1.0, city=0.3, promotions=1.1, female=0.48,
             children=(1.0, 0.85), married=0.3, work={"office worker": 5, "engineer": 3, "medical worker": 1},
             target={"young urbanite": 1}, education=4.4, owns=0.35, ios=0.65, activity=1.5,
             colours=("black", "white", "grey", "silver")),
    _persona("young mother", 0.09, age=(4.0, 0.9), power=2.1, city=1.3, promotions=2.9, female=0.96,
             children=(2.0, 0.04), married=0.93, work={"office worker": 3, "teacher": 2, "self-employed": 2},
             target={"young parents": 1}, education=3.4, owns=0.5, ios=0.5, activity=1.7,
             colours=("pink", "beige", "yellow", "white")),
    _persona("young father", 0.07, age=(4.6, 0.9), power=2.0, city=1.6, promotions=2.0, female=0.04,
             children=(2.4, 0.04), married=0.93, work={"engineer": 3, "factory worker": 2, "office worker": 2},
             target={"young parents": 1}, education=3.4, owns=0.6, ios=0.35, activity=1.0,
             colours=("blue", "black", "grey", "green")),
    _persona("urban family", 0.11, age=(6.6, 1.1), power=1.2, city=0.7, promotions=1.8, female=0.55,
             children=(6.0, 0.08), married=0.9, work={"office worker": 3, "civil servant": 2, "teacher": 2},
             target={"urban family": 1}, education=4.0, owns=0.8, ios=0.5, activity=1.2,
             colours=("white", "blue", "beige", "grey")),
    _persona("small-town family", 0.11, age=(6.2, 1.4), power=3.0, city=3.1, promotions=3.2, female=0.55,
             children=(5.6, 0.08), married=0.92, work={"factory worker": 3, "service worker": 3, "self-employed": 2},
             target={"small-town family": 1}, education=2.1, owns=0.6, ios=0.2, activity=0.9,
             colours=("red", "brown", "orange", "blue")),
    _persona("senior professional", 0.08, age=(8.2, 1.0), power=0.5, city=0.8, promotions=0.9, female=0.42,
             children=(8.0, 0.35), married=0.85, work={"civil servant": 2, "medical worker": 2, "engineer": 2},
             target={"senior professional": 1}, education=4.3, owns=0.92, ios=0.55, activity=0.8,
             colours=("black", "gold", "brown", "silver")),
    _persona("shop owner", 0.07, age=(7.0, 1.6), power=1.8, city=2.6, promotions=1.9, female=0.4,
             children=(6.5, 0.3), married=0.8, work={"self-employed": 1},
             target={"small-town family": 2, "urban family": 1}, education=2.4, owns=0.85, ios=0.35,
             activity=1.3, colours=("gold", "red", "black")),
    _persona("village family", 0.08, age=(7.6, 1.7), power=3.8, city=3.8, promotions=3.3, female=0.5,
             children=(6.2, 0.25), married=0.9, work={"farmer": 4, "factory worker": 1}, target={"village family": 1},
             education=1.0, owns=0.55, ios=0.06, activity=0.4, colours=("green", "brown", "red")),
    _persona("pensioner", 0.09, age=(10.8, 0.9), power=2.6, city=1.9, promotions=2.7, female=0.56, children=None,
             married=0.65, work={"retired": 1}, target={"pensioner": 1}, education=2.0, owns=0.6, ios=0.2,
             activity=0.5, colours=("grey", "beige", "brown", "purple")),
    _persona("gamer", 0.09, age=(2.4, 0.9), power=2.3, city=1.7, promotions=1.9, female=0.12, children=None,
             married=0.06, work={"service worker": 2, "factory worker": 2, "engineer": 2},
             target={"young urbanite": 1}, education=2.9, owns=0.2, ios=0.3, activity=1.6,
             colours=("black", "red", "green", "purple")),
    _persona("fashion fan", 0.09, age=(2.8, 1.0), power=1.7, city=0.9, promotions=2.5, female=0.9, children=None,
             married=0.12, work={"service worker": 3, "office worker": 3, "self-employed": 1},
             target={"young urbanite": 1}, education=3.5, owns=0.15, ios=0.75, activity=1.9,
             colours=("pink", "gold", "red", "orange", "turquoise")),
)  # fmt: skip
"""The twelve kinds of people that the users are drawn from."""


def persona_tables(personas: tuple[Persona, ...] = PERSONAS) -> dict[str, NDArray[np.float64]]:
    """Return, for every attribute, the chances of its values by persona, shape (n_personas, n_values).

    Raises
    ------
    ValueError
        When a persona's weights name a value that the attribute does not have.
    """
    shares = np.array([p.share for p in personas])
    tables: dict[str, NDArray[np.float64]] = {}
    for attribute, values in ATTRIBUTES.items():
        own = np.zeros((len(personas), len(values)))
        for row, persona in enumerate(personas):
            if attribute in persona.ordered:
                centre, spread = persona.ordered[attribute]
                own[row] = np.exp(-0.5 * ((np.arange(len(values)) - centre) / spread) ** 2)
            else:
                weights = persona.weights[attribute]
                unknown = set(weights) - set(values)
                if unknown:
                    raise ValueError(
                        f"persona {persona.name!r} weighs {sorted(unknown)} of {attribute}; allowed: {list(values)}. "
                        "No user was drawn."
                    )
                floor = sum(weights.values()) / len(weights) / 20 if len(values) > 3 else 0.0
                own[row] = [weights.get(v, floor) for v in values]
            own[row] /= own[row].sum()
        everybody = shares @ own / shares.sum()
        tables[attribute] = _P_OF_PERSONA * own + (1 - _P_OF_PERSONA) * everybody
    return tables


def draw_users(n_users: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw users: each one's persona, shape (n_users,), and value codes, shape (n_users, 20).

    A code is the value's place in :data:`ATTRIBUTES`, columns are in its order.
    """
    shares = np.array([p.share for p in PERSONAS])
    personas = rng.choice(len(PERSONAS), size=n_users, p=shares / shares.sum())
    codes = np.empty((n_users, len(ATTRIBUTES)), dtype=np.int64)
    for column, table in enumerate(persona_tables().values()):
        cumulative = np.cumsum(table, axis=1)[personas]  # (U, V)
        drawn = (rng.random(n_users)[:, None] >= cumulative).sum(axis=1)
        codes[:, column] = np.minimum(drawn, table.shape[1] - 1)  # the last sum can end a hair below 1
    return personas.astype(np.int64), codes


def value_chances(codes: NDArray[np.int64], known: NDArray[np.bool_], attribute: str) -> NDArray[np.float64]:
    """Return how probable each value of an attribute is, given what is known of the users, shape (n_users, n_values).

    Users are drawn independently by attribute once their persona is drawn, so that Bayes' rule over the personas is
    exact. A value that is known has probability 1.

    Parameters
    ----------
    codes, known
        The users' codes and which of them are known, shape (n_users, 20).
    attribute
        The attribute asked for.
    """
    tables = persona_tables()
    column = list(ATTRIBUTES).index(attribute)
    log_chances = np.tile(np.log([p.share for p in PERSONAS]), (len(codes), 1))  # (U, personas)
    for other, table in enumerate(tables.values()):
        if other != column:
            log_chances += np.where(known[:, [other]], np.log(table)[:, codes[:, other]].T, 0.0)
    personas = np.exp(log_chances - log_chances.max(axis=1, keepdims=True))
    chances: NDArray[np.float64] = personas / personas.sum(axis=1, keepdims=True) @ tables[attribute]
    sure = known[:, column]
    chances[sure] = np.eye(chances.shape[1])[codes[sure, column]]
    return chances
