"""Report model: everything that the report of a run shows, as plain frozen dataclasses.

Whoever ran something fills these; :mod:`osmf.report` turns them into a page. What a run does not
have (a replayed log has no truth, maybe no pictures and no arms) is None or an empty tuple, and the
page leaves it out. Nothing here computes an interval or an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["all", "before", "after"]
"""The whole run, the part before the tastes changed, the part after."""


class ReportFigureError(ValueError):
    """A figure that cannot be shown: not a number, or outside its own interval or range."""

    def __init__(self, what: str, value: object, allowed: str) -> None:
        super().__init__(f"{what} is {value!r}; allowed: {allowed}. The report is not written.")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval; NaN, and a value outside its interval, are refused."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.value, self.low, self.high)):
            raise ReportFigureError("estimate (value, low, high)", (self.value, self.low, self.high), "finite numbers")
        slack = 1e-9 * max(1.0, abs(self.value))
        if not self.low - slack <= self.value <= self.high + slack:
            raise ReportFigureError("estimate", self.value, f"its interval, {self.low} to {self.high}")


@dataclass(frozen=True, slots=True)
class Counts:
    """Impressions, clicks, and the CTR estimated from them; None where too little was seen."""

    n_impressions: int
    n_clicks: int
    ctr: Estimate | None

    def __post_init__(self) -> None:
        if not 0 <= self.n_clicks <= self.n_impressions:
            raise ReportFigureError("n_clicks", self.n_clicks, f"0 to n_impressions ({self.n_impressions})")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture: its encoded bytes (PNG, JPEG, WebP), or a local path or ``file:`` URI to read them from."""

    data: bytes | None = None
    uri: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHeader:
    """What ran: when, on what, how much, and from which seeds.

    ``n_spoiled`` is how many events a simulator spoiled on purpose; they must equal the dead letters.
    """

    title: str
    command: str
    commit: str
    started_at_ms: int
    seconds: float
    event_start_ms: int
    event_end_ms: int
    n_products: int
    n_impressions: int
    n_clicks: int
    n_consumed: int
    n_produced: int | None = None
    n_spoiled: int | None = None
    dead_letters: Mapping[str, int] = field(default_factory=dict)
    rate_events_s: float
    seeds: Mapping[str, int] = field(default_factory=dict)
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPoint:
    """The stream at one wall-clock moment of the run; ``lag`` is in events, scores are prequential."""

    seconds: float
    events_s: float
    lag: int
    auroc: float | None = None
    log_loss: float | None = None
    n_groups: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A moment worth a mark on the time axis, for example "tastes change"."""

    seconds: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trait:
    """A value more common in a group than among the product's users (share in the group, lift over the product)."""

    attribute: str
    value: str
    share: float
    lift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentShare:
    """How much of a group belongs to one of the simulator's true segments."""

    segment: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A group of one product's users; ``truth`` is its composition from the simulator's segments."""

    group_id: int
    share: float
    profile: tuple[Trait, ...] = ()
    n_members: int | None = None
    truth: tuple[SegmentShare, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Creative:
    """A creative of one product; ``group_id`` is the group it was made for, ``created_s`` the run's second."""

    creative_id: str
    picture: Picture | None = None
    prompt: str | None = None
    origin: Literal["catalogue", "generated"] = "catalogue"
    group_id: int | None = None
    created_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One creative in one group: the whole run, and before and after the product's shift where there was one."""

    group_id: int
    creative_id: str
    all: Counts
    before: Counts | None = None
    after: Counts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDifference:
    """How differently the groups of a product rank its creatives.

    ``ndcg_at_5`` is on shrunk CTRs, the lower the more different; ``ndcg_at_5_null`` is the same for
    a random split of the same sizes, the value that no difference at all would give.
    """

    ndcg_at_5: float
    ndcg_at_5_null: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product with its groups, creatives and counts; ``nmi`` is the groups' agreement with the true segments."""

    product_id: str
    title: str
    category: str | None = None
    picture: Picture | None = None
    groups: tuple[Group, ...] = ()
    creatives: tuple[Creative, ...] = ()
    cells: tuple[Cell, ...] = ()
    nmi: float | None = None
    difference: GroupDifference | None = None

    def cell(self, group_id: int, creative_id: str) -> Cell | None:
        """Return the counts of a creative in a group, or None where it was never shown."""
        for cell in self.cells:
            if cell.group_id == group_id and cell.creative_id == creative_id:
                return cell
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """A detected shift; ``is_true`` says whether the simulator did change the product's category (None: not known)."""

    event_id: str
    product_id: str
    product_title: str
    category: str | None = None
    detected_s: float
    detected_at_ms: int
    statistic: float
    threshold: float
    n_impressions_since_change: int | None = None
    is_true: bool | None = None
    group_ids: tuple[int, ...] = ()
    creative_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmPoint:
    """An arm's CTR up to one moment of the run, with its interval."""

    seconds: float
    ctr: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """An arm of the experiment: its counts in each phase, and its cumulative CTR over time."""

    name: str
    title: str
    all: Counts
    before: Counts | None = None
    after: Counts | None = None
    series: tuple[ArmPoint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """The arms, and the ratio of the group arm's CTR to the one-for-all arm's in each phase.

    ``baseline`` and ``treatment`` name the two arms of the ratio; there may be more arms.
    """

    arms: tuple[Arm, ...]
    baseline: str
    treatment: str
    ratio: Estimate
    ratio_before: Estimate | None = None
    ratio_after: Estimate | None = None

    def arm(self, name: str) -> Arm:
        """Return the arm of a name; KeyError where there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyValues:
    """True mean CTRs of three policies over the simulator's users, in one phase."""

    phase: Phase
    uniform: float
    best_for_all: float
    best_per_segment: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What only a simulator knows; ``changed_categories`` are those whose tastes it changed."""

    mean_nmi: float
    policy_values: tuple[PolicyValues, ...] = ()
    changed_categories: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A dataset that the scheduled offline job wrote."""

    snapshot_id: str
    seconds: float
    n_rows: int
    n_pairs: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that the page shows.

    ``products`` may be fewer than the run had (``header.n_products``); the page says so. ``showcase``
    names the products at the top of the page; left empty, the page chooses them. ``n_products_with_groups``
    is over all products of the run (None: counted over ``products``). ``notes`` are added to those on
    how things were measured.
    """

    header: RunHeader
    stream: tuple[StreamPoint, ...] = ()
    moments: tuple[Moment, ...] = ()
    products: tuple[Product, ...] = ()
    shifts: tuple[Shift, ...] = ()
    experiment: Experiment | None = None
    truth: Truth | None = None
    snapshots: tuple[Snapshot, ...] = ()
    n_products_with_groups: int | None = None
    showcase: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
