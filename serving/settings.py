"""Settings of serving: the HTTP API and the exposure policy."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ServingSettings(BaseModel):
    """The HTTP API and the policy behind it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address that the HTTP API binds.")
    port: int = Field(8100, ge=0, le=65_535, description="Port of the HTTP API; 0 takes a free one.")
    refresh_ms: int = Field(1_000, ge=10, description="How often the policy reads the state, milliseconds.")
    experiment: str = Field("groups", min_length=1, max_length=100, description="Name of the A/B experiment.")
    explore_share: float = Field(
        0.2, ge=0, le=1, description="Share of showings drawn uniformly, in both arms: what keeps estimates honest."
    )
    warm_up_impressions: int = Field(
        15_000,
        ge=0,
        description="Impressions up to which products are shown uniformly, in no arm: what learning needs first. It "
        "ends for a product that has had so many, or whose groups prefer different creatives beyond chance; and for "
        "all with groups, borrowed ones too, as soon as the product of an average impression has had so many, since "
        "the system has learnt then what a new product needs.",
    )
    n_draws: int = Field(
        512, ge=16, le=100_000, description="Posterior draws from which the chance of being the best is estimated."
    )
    seed: int = Field(0, ge=0, description="Seed of the policy's draws.")
