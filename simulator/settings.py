"""Settings of the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class CatalogueSettings(BaseModel):
    """Which products are simulated and where their pictures come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Literal["auto", "debian", "drawn"] = Field(
        "auto",
        description="`debian`: real products of the package sweethome3d-furniture; `drawn`: pictures that the "
        "simulator draws; `auto`: the former, and the latter where the package can't be had",
    )
    n_products: int = Field(24, description="products, taken evenly from all categories", ge=1, le=48)
    min_creatives: int = Field(6, description="fewest creatives of a product", ge=2, le=64)
    max_creatives: int = Field(10, description="most creatives of a product", ge=2, le=64)
    creative_side_px: int = Field(256, description="side of a creative, in pixels", ge=32, le=2048)
    fetch_timeout_s: float = Field(300.0, description="longest wait for the package's download, in seconds", gt=0)

    @model_validator(mode="after")
    def _check_range(self) -> CatalogueSettings:
        if self.min_creatives > self.max_creatives:
            raise ValueError(
                f"min_creatives is {self.min_creatives}, above max_creatives ({self.max_creatives}); "
                "no product could have as many"
            )
        return self


class WorldSettings(BaseModel):
    """The users' true preferences."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_users: int = Field(20_000, description="users in the population", ge=10, le=2_000_000)
    mean_ctr: float = Field(0.06, description="mean CTR when creatives are shown uniformly, a share", gt=0, lt=0.5)
    taste_strength: float = Field(
        0.5, description="logit change per standard deviation of style along a segment's taste", ge=0, le=5
    )
    quality_strength: float = Field(
        0.15, description="logit change per standard deviation of style along the direction that everybody likes", ge=0
    )
    personal_strength: float = Field(
        0.25, description="logit change per standard deviation of style along a user's own taste", ge=0
    )
    user_spread: float = Field(0.30, description="standard deviation of the users' readiness to click, in logits", ge=0)
    product_spread: float = Field(0.25, description="standard deviation of the products' base rates, in logits", ge=0)


class TrafficSettings(BaseModel):
    """How impressions and clicks arrive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_impressions: int = Field(350_000, description="impressions in the run, without the closing stretch", ge=1)
    impressions_per_hour: float = Field(1040.0, description="impressions per hour of event time", gt=0)
    start_ms: int = Field(1_748_822_400_000, description="event time of the start, ms since the epoch", ge=0)
    p_missing_attribute: float = Field(
        0.03, description="share of a user's attribute values that are not known", ge=0, le=1
    )
    click_delay_s: float = Field(240.0, description="mean time from impression to click, in seconds", gt=0)
    p_late_click: float = Field(0.03, description="share of the clicks that come after the usual window", ge=0, le=1)
    late_click_after_s: float = Field(1_800.0, description="a late click's smallest delay, in seconds", ge=0)
    late_click_until_s: float = Field(21_600.0, description="a late click's largest delay, in seconds", gt=0)
    transport_delay_s: float = Field(2.0, description="mean time from an event to its arrival, in seconds", ge=0)
    p_out_of_order: float = Field(0.05, description="share of the events that are held up on their way", ge=0, le=1)
    out_of_order_s: float = Field(60.0, description="longest hold-up on the way, in seconds", ge=0)
    p_duplicate: float = Field(
        0.005, description="share of the events that are sent twice, byte by byte the same", ge=0, le=1
    )
    n_spoiled_per_reason: int = Field(12, description="events spoiled on purpose, for every reason", ge=0)
    spoil_until: float = Field(
        0.6,
        description="share of the run after which nothing is spoiled: a click without an impression shows as one only "
        "when its attribution window is over",
        gt=0,
        le=1,
    )
    closing_hours: float = Field(
        26.0, description="event-time hours of sparse impressions that end the run, so that all windows close", ge=0
    )
    closing_step_s: float = Field(
        3_600.0, description="event time between two rounds of the closing stretch, in seconds", gt=0
    )

    @model_validator(mode="after")
    def _check_late(self) -> TrafficSettings:
        if self.late_click_until_s < self.late_click_after_s:
            raise ValueError(
                f"late_click_until_s is {self.late_click_until_s}, below late_click_after_s "
                f"({self.late_click_after_s}); no late click could be drawn"
            )
        return self


ShiftKind = Literal["swap", "driver"]
"""How tastes change: segments exchange theirs, or another attribute decides them."""


class ShiftSettings(BaseModel):
    """The change of tastes on the way."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: float = Field(0.5, description="share of the impressions after which tastes change", gt=0, le=1)
    n_categories: int = Field(2, description="categories whose tastes change; 0 for none", ge=0)
    categories: tuple[str, ...] = Field((), description="the categories by name; empty: drawn by the seed")
    kind: ShiftKind = Field(
        "swap", description="`swap`: segments exchange their tastes; `driver`: another attribute decides them"
    )


class SimulatorSettings(BaseModel):
    """Everything about the simulated world."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(7, description="seed of all randomness", ge=0)
    run_id: str = Field(
        "sim", description="prefix of the impression ids", min_length=1, max_length=40, pattern=r"^[\w.-]+$"
    )
    cache_dir: Path = Field(
        Path("~/.cache/osmf"),
        description="folder of the fetched catalogue (`catalogue/`) and the drawn creatives (`creatives/`)",
    )
    catalogue: CatalogueSettings = CatalogueSettings()
    world: WorldSettings = WorldSettings()
    traffic: TrafficSettings = TrafficSettings()
    shift: ShiftSettings = ShiftSettings()
    decider: Literal["service", "uniform"] = Field(
        "service", description="who chooses what is shown: the decision service, or chance (for benchmarks)"
    )
    decision_url: str = Field("http://127.0.0.1:8100", description="address of the decision service")
    batch_size: int = Field(512, description="requests asked at once", ge=1, le=10_000)
    request_timeout_s: float = Field(
        10.0, description="longest wait for one answer of the decision service, in seconds", gt=0
    )
    max_wait_s: float = Field(
        120.0,
        description="longest wait for a decision service that is down, or that makes no progress, in seconds",
        gt=0,
    )
    max_ahead: int = Field(20_000, description="most impressions that the run may be ahead of what is processed", ge=1)
    impressions_per_s: float | None = Field(
        None, description="upper limit of the rate, impressions per second; none: no limit", gt=0
    )
    out_dir: Path = Field(Path("out/simulate"), description="folder of progress.json and truth.json")
    progress_every_s: float = Field(0.5, description="time between two writes of progress.json, in seconds", gt=0)
    n_truth_users: int = Field(2_000, description="users whose true segments are written to truth.json", ge=0)
