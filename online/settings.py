"""Settings of the online process: the preference model, groups, counts and shift detection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from online.limits import most_product_bytes
from streams.attributes import TABLE_4
from streams.events import ShiftScope


class AttributeSettings(BaseModel):
    """The users' attributes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    values: dict[str, tuple[str, ...]] = Field(
        dict(TABLE_4), description="Attributes with their known values; default: the paper's twenty (Table 4)."
    )
    buckets: dict[str, int] = Field(
        {}, description="Attributes without a list of values, and into how many buckets their values are hashed."
    )


class EncoderSettings(BaseModel):
    """The frozen encoders of titles and images (Eq. 1)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Literal["minilm", "hashed"] = Field(
        "minilm",
        description="Encoder of titles: all-MiniLM-L6-v2 (384-d), or a hash of the words (no model needed).",
    )
    image: Literal["efficientnet", "hashed"] = Field(
        "efficientnet",
        description="Encoder of creatives: the style that early layers of EfficientNet-Lite0 show (1024-d). `hashed` "
        "knows only the creative's id.",
    )


ModelForm = Literal["shipped", "paper"]
"""Forms of the preference model."""


class ModelSettings(BaseModel):
    """The preference model (Eq. 1-4) and its training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: ModelForm = Field(
        "shipped",
        description="`shipped`: titles weight the users' attributes, one vector for a title and one for an image. "
        "`paper`: Eq. 2 and 3 as written, attention of every impression over the title's tokens and the image's 49 "
        "patches; ten times slower and for comparison. It needs online.groups.space = embedding.",
    )
    n_heads: int = Field(4, ge=1, description="Heads of the attention of the `paper` form; they divide d_model.")
    d_model: int = Field(128, ge=8, description="Width of the embeddings; the paper's is 128.")
    d_field: int = Field(16, ge=2, description="Width of one attribute's embedding.")
    d_hidden: int = Field(256, ge=8, description="Width of the user MLP's hidden layer.")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="Adam's step size.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay, as AdamW's.")
    user_weight_decay: float = Field(
        3.0,
        ge=0,
        description="Weight decay of the layers that read the users' attributes, the first to learn single rows "
        "by heart.",
    )
    batch_rows: int = Field(512, ge=1, description="New labelled impressions of one step.")
    replay_ratio: float = Field(2.0, ge=0, le=8, description="Replayed rows for each new row of a step.")
    replay_rows: int = Field(131_072, ge=0, description="Labelled impressions that replay draws from.")
    ema_steps: int = Field(
        400,
        ge=1,
        description="Steps over which the weights that are used are averaged; fewer at first, a quarter of all steps.",
    )


UserSpace = Literal["taste", "embedding"]
"""What users are clustered by."""


class GroupSettings(BaseModel):
    """Product-aware adaptive grouping (section 3.2, Algorithm 1), as a stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    space: UserSpace = Field(
        "taste",
        description="What users are clustered by. `embedding`: e_{u|t}, as in the paper; `taste`: the part of it that "
        "decides which images they prefer, so that users whom only an attribute sets apart are one group. "
        "A state keeps the one that it was built with; with another it is refused.",
    )
    k_min: int = Field(2, ge=2, description="Fewest groups tried (a product whose groups do not differ has one).")
    k_max: int = Field(5, ge=2, le=16, description="Most groups tried; the paper's limit is 5.")
    reservoir_users: int = Field(512, ge=64, description="Users sampled per product, on which K is chosen.")
    reservoir_memory: float = Field(
        8.0, ge=1, description="Impressions that the reservoir represents, in units of its size: larger forgets slower."
    )
    warm_up_impressions: int = Field(20_000, ge=0, description="Labelled impressions learnt before the first grouping.")
    adopt_every_impressions: int = Field(20_000, ge=1, description="Labelled impressions between two encoder versions.")
    refresh_every_impressions: int = Field(
        600,
        ge=1,
        description="Impressions of a product after which it moves to a new encoder version and is regrouped; while it "
        "has had fewer than four times as many, after a quarter of them. A product whose tastes have changed does not "
        "wait.",
    )
    refresh_products_per_batch: int = Field(
        8, ge=1, description="Products re-embedded and regrouped in one micro-batch: the budget after a new version."
    )
    expect_every_impressions: int = Field(
        100,
        ge=1,
        description="Impressions of a product after which the model is asked again which creatives its groups prefer, "
        "also while they stay as they are. One that has had more than twenty times as many waits for a twentieth of "
        "them, unless its tastes have changed.",
    )
    expect_products_per_batch: int = Field(
        8,
        ge=0,
        description="Products about which it is asked again in one micro-batch, those that have had most impressions "
        "since first. 0: only when a product is regrouped.",
    )
    centroid_memory: float = Field(
        4_096, ge=1, description="Impressions that a centroid remembers: its rate is 1/n until n reaches this."
    )
    min_share: float = Field(
        0.05,
        ge=0,
        lt=0.5,
        description="Smallest share of the users that a group may have: a K with a smaller one is not chosen.",
    )
    k_tolerance: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Silhouette that is given up for fewer groups: the smallest K within it of the best is chosen; "
        "0 is the paper's choice.",
    )
    k_hysteresis: float = Field(
        0.02, ge=0, le=1, description="Silhouette by which another K must be chosen before it replaces the present one."
    )
    survive_overlap: float = Field(
        0.5, gt=0, le=1, description="Jaccard overlap of members from which a new group is the old one."
    )
    distinct_p_value: float = Field(
        0.01, gt=0, lt=1, description="Groups count as different when chance explains it with less than this."
    )


class CountSettings(BaseModel):
    """Live counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    half_life_s: int = Field(
        2_419_200, ge=60, description="Time in which a live count loses half of its weight, seconds of event time."
    )
    user_buckets: int = Field(64, ge=2, le=4096, description="Buckets of users, from which arms get their intervals.")


class ShiftSettings(BaseModel):
    """Detection of changed tastes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    warm_up_impressions: int = Field(
        500, ge=0, description="Labelled impressions of a product with different groups before its detector starts."
    )
    false_alarms_per_million: float = Field(
        2.0,
        gt=0,
        le=500,
        description="False alarms that are accepted in a million impressions of products whose tastes stay. Fewer make "
        "a change be found later: one tenth of them, after 1.3 times the impressions.",
    )
    min_impressions: int = Field(
        200, ge=1, description="Labelled impressions since the estimated change that a shift needs as evidence."
    )
    cool_down_impressions: int = Field(
        3_000, ge=0, description="Labelled impressions of the product after a shift in which no other is published."
    )

    def threshold(self, scope: ShiftScope) -> float:
        """Return the cumulative log-likelihood ratio that raises the alarm, nats."""
        scale, share = FALSE_ALARMS[scope]
        return math.log(scale / (share * self.false_alarms_per_million))


FALSE_ALARMS: Final[Mapping[ShiftScope, tuple[float, float]]] = {"category": (800.0, 0.9), "product": (2_600.0, 0.1)}
"""False alarms in a million impressions at a threshold of 0, by extrapolation, and the scope's share of those accepted.

Measured in 4.4 million watched impressions of worlds 101 to 106, whose tastes stayed: sums of categories rose to 5, 6
and 7 nats 4.3, 2.5 and 0.9 times in a million, those of products to 6, 7 and 8 nats 6.9, 2.5 and 0.7 times. Tastes
change for a kind of product rather than for one, so that the categories have the greater share.
"""


class LedgerSettings(BaseModel):
    """The ledger: who added what, so that a click that was fraud or a forgotten user can be taken back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    retention_s: int = Field(
        2_592_000,
        ge=0,
        description="How long an impression and its click can be taken back, seconds of event time; what is older "
        "stays counted, with nothing that leads to its user. 0: nothing is kept, and corrections are refused.",
    )
    max_entries: int = Field(
        10_000_000,
        ge=1,
        description="Impressions and later clicks in the ledger at most, about 120 bytes each; beyond, the oldest go.",
    )
    hash_key: SecretStr = Field(
        SecretStr(""),
        description="Key of the hash by which users are found in the ledger: without it nobody can tell from the state "
        "who they are. A state keeps the one that it was built with.",
    )


class LimitSettings(BaseModel):
    """What products may cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resident_products: int = Field(
        20_000,
        ge=1,
        description="Products of which groups, counts, expectations and detectors are held in memory. Those beyond, "
        "the least recently active, are parked in the state and brought in when an event shows them.",
    )
    bytes_per_product: int = Field(
        524_288,
        ge=1,
        description="Ceiling of what one resident product may hold in memory, bytes. Settings under which one could "
        "need more are refused.",
    )
    creatives_per_product: int = Field(
        24,
        ge=1,
        description="Creatives of a product that bytes_per_product has to cover. One with more is worked off all the "
        "same, and may need more.",
    )
    products: int = Field(
        200_000,
        ge=1,
        description="Products that are registered; further ones go to the dead letters. Their titles' features stay in "
        "memory, about 4 KB each.",
    )
    creatives: int = Field(
        500_000,
        ge=1,
        description="Creatives that are registered, of all products; further ones go to the dead letters. Their "
        "images' features stay in memory, about 9 KB each.",
    )
    arms: int = Field(
        1_000,
        ge=1,
        description="Arms of experiments that are counted, each in online.counts.user_buckets; events of further ones "
        "count for their groups only, and the state says how many.",
    )


class OnlineSettings(BaseModel):
    """The online process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, ge=0, description="Seed of the weights and of every sample that is drawn.")
    torch_threads: int = Field(1, ge=1, description="Threads of torch; more than there are cores is far slower.")
    attributes: AttributeSettings = AttributeSettings()
    encoders: EncoderSettings = EncoderSettings()
    model: ModelSettings = ModelSettings()
    groups: GroupSettings = GroupSettings()
    counts: CountSettings = CountSettings()
    shift: ShiftSettings = ShiftSettings()
    ledger: LedgerSettings = LedgerSettings()
    limits: LimitSettings = LimitSettings()

    @model_validator(mode="after")
    def _form_fits(self) -> Self:
        if self.model.form == "paper" and self.groups.space == "taste":
            raise ValueError(
                "online.model.form is 'paper', online.groups.space is 'taste': the paper's form has no tastes beside "
                "e_{u|t}, so nothing was started. Set online.groups.space to 'embedding', or the form to 'shipped'."
            )
        if self.model.form == "paper" and self.model.d_model % self.model.n_heads:
            raise ValueError(
                f"online.model.n_heads is {self.model.n_heads}, allowed are divisors of online.model.d_model = "
                f"{self.model.d_model}: the heads share its width. Nothing was started."
            )
        return self

    @model_validator(mode="after")
    def _products_fit(self) -> Self:
        n_attributes = len(self.attributes.values) + len(self.attributes.buckets)
        need = most_product_bytes(
            n_sampled=self.groups.reservoir_users,
            n_attributes=n_attributes,
            d_model=self.model.d_model,
            k_min=self.groups.k_min,
            k_max=self.groups.k_max,
            n_creatives=self.limits.creatives_per_product,
        )
        if need.total > self.limits.bytes_per_product:
            raise ValueError(
                f"online.limits.bytes_per_product is {self.limits.bytes_per_product:,}, a product may need "
                f"{need.total:,} bytes: {need.sample:,} for its sample of users (online.groups.reservoir_users = "
                f"{self.groups.reservoir_users}, {n_attributes} online.attributes), {need.groups:,} for its groups "
                f"(online.groups.k_max = {self.groups.k_max}, online.model.d_model = {self.model.d_model}) and "
                f"{need.counts:,} for its counts (online.groups.k_max, online.limits.creatives_per_product = "
                f"{self.limits.creatives_per_product}). Nothing was started. Lower one of these, or raise the ceiling."
            )
        return self
