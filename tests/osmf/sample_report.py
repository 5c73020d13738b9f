"""A sample report: a made-up run with plausible figures, for the tests and for looking at the page."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from osmf.report_model import (
    Arm,
    ArmPoint,
    Cell,
    Counts,
    Creative,
    Estimate,
    Experiment,
    Group,
    GroupDifference,
    Moment,
    Picture,
    PolicyValues,
    Product,
    Report,
    RunHeader,
    SegmentShare,
    Shift,
    Snapshot,
    StreamPoint,
    Trait,
    Truth,
)

STARTED_AT_MS = 1_760_000_000_000
SHIFT_S = 120.0
SECONDS = 240.0
CATEGORIES = ("living room", "kitchen", "lighting", "office", "bedroom", "outdoor")
CHANGED = ("lighting", "office")
TITLES = (
    "Two-seat sofa, oak legs", "Armchair with footstool", "Low coffee table", "Bookcase, five shelves",
    "Espresso machine", "Bar stool", "Farmhouse dining table", "Copper saucepan set",
    "Arc floor lamp", "Brass desk lamp", "Paper pendant lamp", "Bedside lamp",
    "Mesh office chair", "Standing desk", "Monitor arm", "Filing cabinet",
    "Double bed, slatted", "Bunk bed", "Chest of drawers", "Wardrobe with mirror",
    "Garden bench", "Parasol", "Teak deck chair", "Charcoal grill",
)  # fmt: skip
TRAITS = {
    "living room": (("gender", "female"), ("gender", "male")),
    "kitchen": (("age", "25-34"), ("age", "45-54"), ("age", "18-24")),
    "lighting": (("resident_city_level", "tier_1"), ("resident_city_level", "tier_3"), ("resident_city_level", "5")),
    "office": (("profession", "office worker"), ("profession", "student")),
    "bedroom": (("marriage", "yes"), ("marriage", "no")),
    "outdoor": (("has_house", "yes"), ("purchase_power", "1"), ("has_house", "no"), ("education", "degree")),
}
SCENES = ("misty mountains", "sunlit beach", "city street at night", "pine forest", "modern kitchen", "flower meadow")
PALETTES = ("warm", "cool", "pastel", "jewel", "earthy", "fresh")
TOP = ((238, 196, 150), (150, 190, 225), (240, 208, 222), (58, 84, 120), (186, 160, 122), (178, 222, 190))
BOTTOM = ((190, 110, 70), (62, 108, 150), (190, 170, 220), (110, 40, 90), (110, 92, 66), (92, 160, 130))


def make_report(
    *, n_products: int = 24, n_creatives: int = 8, n_made: int = 2, picture_px: int = 320, seed: int = 7
) -> Report:
    """Return the sample; pictures have noise in them, so that they compress as badly as real ones."""
    rng = np.random.default_rng(seed)
    products: list[Product] = []
    shifts: list[Shift] = []
    for k in range(n_products):
        product, shift = _product(k, rng, n_creatives, n_made, picture_px)
        products.append(product)
        if shift is not None:
            shifts.append(shift)
    experiment = _experiment(rng)
    impressions = sum(arm.all.n_impressions for arm in experiment.arms)
    clicks = sum(arm.all.n_clicks for arm in experiment.arms)
    dead_letters = {"invalid_field": 41, "bad_json": 38, "missing_field": 33, "unknown_version": 39}
    return Report(
        header=RunHeader(
            title="Demo run",
            command="osmf demo --seed 7",
            commit="4f2c91d07be14c0a9a9dd2f0a1b35f1f0c7e6d21",
            started_at_ms=STARTED_AT_MS,
            seconds=SECONDS + 11.4,
            event_start_ms=STARTED_AT_MS,
            event_end_ms=STARTED_AT_MS + 14 * 86_400_000,
            n_products=n_products,
            n_impressions=impressions,
            n_clicks=clicks,
            n_consumed=impressions + clicks + 151,
            n_produced=impressions + clicks + 151,
            n_spoiled=151,
            dead_letters=dead_letters,
            rate_events_s=(impressions + clicks) / SECONDS,
            seeds={"world": seed, "stream": 11},
            device="a processor, 2 threads",
        ),
        stream=_stream(rng),
        moments=(Moment(seconds=SHIFT_S, label="tastes change"),),
        products=tuple(products),
        shifts=tuple(shifts),
        experiment=experiment,
        truth=Truth(
            mean_nmi=float(np.mean([p.nmi for p in products if p.nmi is not None])),
            policy_values=(
                PolicyValues(phase="before", uniform=0.0312, best_for_all=0.0398, best_per_segment=0.0521),
                PolicyValues(phase="after", uniform=0.0308, best_for_all=0.0391, best_per_segment=0.0549),
            ),
            changed_categories=CHANGED,
        ),
        snapshots=tuple(
            Snapshot(
                snapshot_id=f"snapshot-{k:04d}",
                seconds=60.0 * k,
                n_rows=310 + 155 * k,
                n_pairs=420 * k,
                path=f"out/demo/datasets/{k:04d}",
            )
            for k in (1, 2, 3)
        ),
        notes=("The ratio's interval is a bootstrap over users.",),
    )


def make_replay_report() -> Report:
    """Return the report of a replayed log: no truth, no arms, no pictures, one product without a group."""
    empty = Product(product_id="item-2", title="item-2", creatives=(Creative(creative_id="c9"),))
    cells = tuple(
        Cell(group_id=g, creative_id=f"c{c}", all=_counts(900 + 100 * c, 0.005 + 0.002 * ((g + c) % 3)))
        for g in (0, 4)
        for c in range(3)
    )
    item = Product(
        product_id="item-1",
        title="item-1",
        groups=(Group(group_id=0, share=0.6), Group(group_id=4, share=0.4)),
        creatives=tuple(Creative(creative_id=f"c{c}") for c in range(4)),
        cells=(*cells, Cell(group_id=4, creative_id="c3", all=Counts(2, 0, None))),
    )
    header = RunHeader(
        title="Replay of a click log",
        command="osmf replay",
        commit="unknown",
        started_at_ms=STARTED_AT_MS,
        seconds=3.2,
        event_start_ms=STARTED_AT_MS,
        event_end_ms=STARTED_AT_MS + 86_400_000,
        n_products=80,
        n_impressions=60_000,
        n_clicks=287,
        n_consumed=60_287,
        rate_events_s=18_840.0,
        device="a processor, 2 threads",
    )
    return Report(header=header, products=(item, empty))


def picture_bytes(rng: np.random.Generator, side_px: int, look: int, *, cut_out: bool = False) -> bytes:
    """Return a drawn picture: a backdrop with light and grain, and the product's shape in front."""
    hue = look % len(TOP)
    if cut_out:
        image = Image.new("RGBA", (side_px, side_px), (0, 0, 0, 0))
    else:
        ramp = np.linspace(0, 1, side_px)[:, None, None]
        sky = np.array(TOP[hue]) * (1 - ramp) + np.array(BOTTOM[hue]) * ramp
        backdrop = np.broadcast_to(sky, (side_px, side_px, 3)) + rng.normal(0, 6, (side_px, side_px, 3))
        image = Image.fromarray(backdrop.clip(0, 255).astype(np.uint8))
        drops = Image.new("RGBA", image.size, (0, 0, 0, 0))
        pen = ImageDraw.Draw(drops)
        for _ in range(14):
            x, y = int(rng.integers(0, side_px)), int(rng.integers(0, side_px // 2))
            r = int(rng.integers(4, side_px // 8))
            box = (x - r, y - r, x + r, y + r)
            pen.ellipse(box, fill=(255, 255, 255, int(rng.integers(15, 60))))
        drops = drops.filter(ImageFilter.GaussianBlur(4))
        image.paste(drops, (0, 0), drops)
        floor = (0, int(side_px * 0.78), side_px, side_px)
        ImageDraw.Draw(image).rectangle(floor, fill=BOTTOM[(hue + 2) % len(BOTTOM)])
    pen = ImageDraw.Draw(image)
    s = side_px / 100
    body = ((60, 68, 80), (150, 84, 58), (88, 108, 84), (180, 150, 96))[look // 7 % 4]
    pen.rounded_rectangle((24 * s, 46 * s, 76 * s, 72 * s), radius=6 * s, fill=body)
    pen.rounded_rectangle((28 * s, 34 * s, 72 * s, 56 * s), radius=7 * s, fill=tuple(min(c + 26, 255) for c in body))
    for leg in (30, 66):
        pen.rectangle((leg * s, 72 * s, (leg + 4) * s, 84 * s), fill=(70, 52, 40))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _product(
    k: int, rng: np.random.Generator, n_creatives: int, n_made: int, picture_px: int
) -> tuple[Product, Shift | None]:
    category = CATEGORIES[k // 4 % len(CATEGORIES)]
    changed = category in CHANGED and k % 4 != 3
    traits = TRAITS[category]
    shares = rng.dirichlet([9.0] * len(traits))
    product_id = f"P{k:03d}"
    groups = tuple(
        Group(
            group_id=3 + g,
            share=float(shares[g]),
            n_members=int(4000 * shares[g]),
            profile=(
                Trait(attribute=traits[g][0], value=traits[g][1], share=0.83, lift=1.0 / (0.2 + shares[g])),
                Trait(attribute="age", value=("25-34", "35-44", "18-24", "55-64")[g], share=0.34, lift=1.6),
                Trait(attribute="os_plant", value="ios", share=0.5, lift=1.02),
            ),
            truth=(
                SegmentShare(segment=f"segment {g + 1}", share=0.9 - 0.07 * (k % 4)),
                SegmentShare(segment=f"segment {(g + 1) % len(traits) + 1}", share=0.1 + 0.07 * (k % 4)),
            ),
        )
        for g in range(len(traits))
    )
    creatives = [
        Creative(
            creative_id=f"{product_id}-{c:02d}",
            picture=Picture(data=picture_bytes(rng, picture_px, c + 7 * k)),
            prompt=_prompt(k, c),
        )
        for c in range(n_creatives)
    ]
    made: list[Creative] = []
    if changed:
        made = [
            Creative(
                creative_id=f"{product_id}-g{g}{m}",
                picture=Picture(data=picture_bytes(rng, picture_px, 3 + g + 2 * m + 7 * k)),
                prompt=_prompt(k, 3 + g + 2 * m),
                origin="generated",
                group_id=groups[g].group_id,
                created_s=SHIFT_S + 14 + k,
            )
            for g in range(len(groups))
            for m in range(n_made)
        ]
    cells: list[Cell] = []
    for group in groups:
        taste = rng.normal(0, 0.35, n_creatives + len(made))
        turned = taste[rng.permutation(len(taste))] if changed else taste
        for c, creative in enumerate([*creatives, *made]):
            n = int(rng.gamma(4, 260) * group.share * len(groups)) + 60
            is_made = creative.origin == "generated"
            if is_made and creative.group_id != group.group_id:
                continue
            p_before, p_after = 0.031 * math.exp(taste[c]), 0.031 * math.exp(turned[c] + (0.45 if is_made else 0))
            before = Counts(0, 0, None) if is_made else _counts(n, p_before)
            after = _counts(int(n * rng.uniform(0.4, 1.8)), p_after)
            both = Counts(
                before.n_impressions + after.n_impressions,
                before.n_clicks + after.n_clicks,
                _ctr(before.n_impressions + after.n_impressions, before.n_clicks + after.n_clicks),
            )
            cells.append(
                Cell(
                    group_id=group.group_id,
                    creative_id=creative.creative_id,
                    all=both,
                    before=before if changed else None,
                    after=after if changed else None,
                )
            )
    null = 0.985 + 0.01 * float(rng.random())
    product = Product(
        product_id=product_id,
        title=TITLES[k % len(TITLES)] + ("" if k < len(TITLES) else f" {k}"),
        category=category,
        picture=Picture(data=picture_bytes(rng, picture_px, 7 * k, cut_out=True)),
        groups=groups,
        creatives=(*creatives, *made),
        cells=tuple(cells),
        nmi=float(np.clip(rng.normal(0.82, 0.08), 0, 1)),
        difference=GroupDifference(ndcg_at_5=0.72 + 0.18 * float(rng.random()), ndcg_at_5_null=null),
    )
    if not changed:
        return product, None
    return product, Shift(
        event_id=f"shift-{product_id}",
        product_id=product_id,
        product_title=product.title,
        category=category,
        detected_s=SHIFT_S + 9 + k,
        detected_at_ms=STARTED_AT_MS + 7 * 86_400_000 + 3_600_000 * k,
        statistic=30.0 + k,
        threshold=24.5,
        n_impressions_since_change=900 + 13 * k,
        is_true=True,
        group_ids=tuple(group.group_id for group in groups),
        creative_ids=tuple(creative.creative_id for creative in made),
    )


def _prompt(k: int, c: int) -> str:
    scene, palette = SCENES[c % len(SCENES)], PALETTES[(c + k) % len(PALETTES)]
    return f"{TITLES[k % len(TITLES)]}, {scene}, {palette} palette, soft daylight, green plants, centred"


def _counts(n: int, p: float) -> Counts:
    return Counts(n, round(n * p), _ctr(n, round(n * p)))


def _ctr(n: int, clicks: int) -> Estimate:
    """Return a CTR shrunk towards 3% as if by 300 impressions, with a normal interval."""
    mean = (clicks + 9) / (n + 300)
    half = 1.96 * math.sqrt(mean * (1 - mean) / (n + 300))
    return Estimate(mean, max(mean - half, 0.0), mean + half)


def _experiment(rng: np.random.Generator) -> Experiment:
    total, rates = 60_000, {"all": (0.0381, 0.0372), "group": (0.0418, 0.0469)}
    titles = {"all": "Best for all", "group": "Best for the group"}
    arms: list[Arm] = []
    for name, (before_ctr, after_ctr) in rates.items():
        series: list[ArmPoint] = []
        n, clicks = 0, 0
        for step in range(1, 61):
            n += total // 60
            clicks += int(rng.binomial(total // 60, before_ctr if step <= 30 else after_ctr))
            series.append(ArmPoint(seconds=4.0 * step, ctr=_ctr(n, clicks)))
        arms.append(
            Arm(
                name=name,
                title=titles[name],
                all=Counts(n, clicks, _ctr(n, clicks)),
                before=_counts(total // 2, before_ctr),
                after=_counts(total // 2, after_ctr),
                series=tuple(series),
            )
        )
    return Experiment(
        arms=tuple(arms),
        baseline="all",
        treatment="group",
        ratio=Estimate(1.178, 1.112, 1.247),
        ratio_before=Estimate(1.097, 1.015, 1.186),
        ratio_after=Estimate(1.261, 1.164, 1.366),
    )


def _stream(rng: np.random.Generator) -> tuple[StreamPoint, ...]:
    points: list[StreamPoint] = []
    for k in range(1, int(SECONDS) + 1):
        dip = 0.02 * math.exp(-max(k - SHIFT_S, 0) / 30) if k > SHIFT_S else 0.0
        points.append(
            StreamPoint(
                seconds=float(k),
                events_s=float(520 + 40 * math.sin(k / 9) + rng.normal(0, 25)),
                lag=int(max(0, rng.normal(600, 200) + (900 if 118 < k < 130 else 0))),
                auroc=None if k < 6 else 0.715 - 0.2 * math.exp(-k / 25) - dip,
                log_loss=None if k < 6 else 0.148 + 0.05 * math.exp(-k / 20) + 0.2 * dip,
                n_groups=min(68, int(24 + k / 2)),
            )
        )
    return tuple(points)
