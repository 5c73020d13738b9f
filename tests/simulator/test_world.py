from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generator.prompt import VOCABULARY, Prompt
from simulator.attributes import ATTRIBUTES, PERSONAS, draw_users, persona_tables
from simulator.creatives import choose_prompts
from simulator.settings import CatalogueSettings, WorldSettings
from simulator.world import (
    DRIVERS,
    N_STYLE_DIMS,
    STYLE_SPREAD,
    NotEnoughCategories,
    UnknownCategory,
    World,
    style_of,
)

CATEGORIES = ["seating", "lamps", "kitchen", "electronics", "toys", "fashion"] * 2
SETTINGS = WorldSettings(n_users=6_000)


def make_world(seed: int = 7) -> tuple[World, list[np.ndarray]]:
    world = World.create(SETTINGS, CATEGORIES, seed)
    prompts = choose_prompts(
        world, [f"product {i}" for i in range(len(CATEGORIES))], CatalogueSettings(), np.random.default_rng(seed)
    )
    styles = [np.stack([style_of(prompt) for prompt in of_product]) for of_product in prompts]
    return world.calibrate(styles), styles


@pytest.fixture(scope="module")
def world_and_styles() -> tuple[World, list[np.ndarray]]:
    return make_world()


def all_styles(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = 500
    return (
        rng.integers(world.n_users, size=n),
        rng.integers(world.n_products, size=n),
        STYLE_SPREAD * rng.normal(size=(n, N_STYLE_DIMS)),
    )


def test_table_4() -> None:
    assert len(ATTRIBUTES) == 20
    given_by_the_paper = {
        "age": 13,
        "color": 15,
        "child_age": 10,
        "profession": 11,
        "user_active": 3,
        "education": 6,
        "customer_points": 5,
        "resident_city_level": 5,
    }
    assert {name: len(ATTRIBUTES[name]) for name in given_by_the_paper} == given_by_the_paper
    for values in ATTRIBUTES.values():
        assert len(set(values)) == len(values) >= 2


def test_personas_are_chances() -> None:
    assert len(PERSONAS) == 12
    for name, table in persona_tables().items():
        assert table.shape == (12, len(ATTRIBUTES[name]))
        np.testing.assert_allclose(table.sum(axis=1), 1.0)
        assert table.min() >= 0


def test_every_value_occurs_and_attributes_are_correlated() -> None:
    _, codes = draw_users(20_000, np.random.default_rng(3))
    names = list(ATTRIBUTES)
    for column, values in enumerate(ATTRIBUTES.values()):
        assert len(np.unique(codes[:, column])) == len(values)
    age, target = codes[:, names.index("age")], codes[:, names.index("target_group")]
    students = target == ATTRIBUTES["target_group"].index("student")
    assert age[students].mean() < age[~students].mean() - 2


def test_drivers_cut_into_segments_of_a_fair_size(world_and_styles: tuple[World, list[np.ndarray]]) -> None:
    world, _ = world_and_styles
    drivers = [taste.driver for taste in world.categories.values()]
    assert len({driver.attribute for driver in drivers}) == len(drivers)
    for driver in DRIVERS:
        assert 2 <= driver.n_segments <= 4
        assert set(driver.segment_of_value().values()) == set(range(driver.n_segments))
    for category, taste in world.categories.items():
        shares = np.bincount(world.segments(category), minlength=taste.driver.n_segments) / world.n_users
        assert shares.min() > 0.15


def test_segment_follows_from_the_attribute_value(world_and_styles: tuple[World, list[np.ndarray]]) -> None:
    world, _ = world_and_styles
    for user in range(50):
        values = world.attribute_values(user)
        for category, taste in world.categories.items():
            expected = taste.driver.segment_of_value()[values[taste.driver.attribute]]
            assert world.true_segment(user, category) == expected


def test_tastes_within_a_category_conflict(world_and_styles: tuple[World, list[np.ndarray]]) -> None:
    world, _ = world_and_styles
    for taste in world.categories.values():
        np.testing.assert_allclose(np.linalg.norm(taste.tastes, axis=1), 1.0)
        cosines = taste.tastes @ taste.tastes.T
        others = cosines[~np.eye(len(cosines), dtype=bool)]
        assert others.max() < (-0.9 if len(cosines) == 2 else -0.2)


def test_segments_have_different_best_creatives(world_and_styles: tuple[World, list[np.ndarray]]) -> None:
    world, styles = world_and_styles
    for product, of_product in enumerate(styles):
        ctrs = world.segment_ctrs(product, of_product)
        assert len(set(ctrs.argmax(axis=1))) == len(ctrs)


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_policies_are_worth_what_the_demo_needs(seed: int) -> None:
    world, styles = make_world(seed)
    values = world.policy_values(styles)
    assert values.uniform == pytest.approx(SETTINGS.mean_ctr, rel=0.01)
    assert 1.6 < values.best_per_segment / values.uniform < 2.0
    assert values.best_for_all / values.uniform < 1.35
    assert values.best_per_segment / values.best_for_all > 1.3


def test_policy_values_agree_with_brute_force(world_and_styles: tuple[World, list[np.ndarray]]) -> None:
    world, styles = world_and_styles
    users = np.arange(world.n_users)
    uniform, for_all, per_segment = 0.0, 0.0, 0.0
    for product, of_product in enumerate(styles):
        chances = np.stack(
            [
                world.p_click(users, np.full(len(users), product), np.tile(style, (len(users), 1)))
                for style in of_product
            ]
        )
        uniform += chances.mean()
        for_all += chances.mean(axis=1).max()
        segments = world.segments(world.product_categories[product])
        best = {s: chances[:, segments == s].mean(axis=1).argmax() for s in np.unique(segments)}
        per_segment += float(np.mean([chances[best[s], user] for user, s in enumerate(segments)]))
    values = world.policy_values(styles)
    expected = np.array([uniform, for_all, per_segment]) / len(styles)
    np.testing.assert_allclose([values.uniform, values.best_for_all, values.best_per_segment], expected, rtol=1e-9)


def test_the_same_seed_makes_the_same_world() -> None:
    first, second, other = (World.create(SETTINGS, CATEGORIES, seed) for seed in (5, 5, 6))
    rows = all_styles(first, np.random.default_rng(0))
    np.testing.assert_array_equal(first.p_click(*rows), second.p_click(*rows))
    assert not np.array_equal(first.p_click(*rows), other.p_click(*rows))
    np.testing.assert_array_equal(first.frozen_tastes()(*rows), first.p_click(*rows))


@pytest.mark.parametrize("kind", ["swap", "driver"])
def test_a_shift_changes_only_the_named_categories(world_and_styles: tuple[World, list[np.ndarray]], kind: str) -> None:
    world, _ = world_and_styles
    rows = all_styles(world, np.random.default_rng(1))
    before = world.p_click(*rows)
    shifted = world.shift(["lamps", "toys"], kind)  # type: ignore[arg-type]
    after = shifted.p_click(*rows)
    changed = np.isin(np.array(world.product_categories)[rows[1]], ["lamps", "toys"])
    np.testing.assert_array_equal(before[~changed], after[~changed])
    assert (before[changed] != after[changed]).mean() > 0.5
    np.testing.assert_array_equal(world.p_click(*rows), before)  # the world of before is as it was


def test_a_swap_keeps_the_segments_and_moves_their_tastes(world_and_styles: tuple[World, list[np.ndarray]]) -> None:
    world, styles = world_and_styles
    shifted = world.shift(["lamps"], "swap")
    np.testing.assert_array_equal(world.segments("lamps"), shifted.segments("lamps"))
    product = CATEGORIES.index("lamps")
    before, after = (w.segment_ctrs(product, styles[product]).argmax(axis=1) for w in (world, shifted))
    assert (before != after).all()


def test_another_driver_is_one_that_was_free(world_and_styles: tuple[World, list[np.ndarray]]) -> None:
    world, _ = world_and_styles
    shifted = world.shift(["lamps"], "driver")
    used = {taste.driver.attribute for taste in world.categories.values()}
    assert shifted.categories["lamps"].driver.attribute not in used


def test_swapping_as_often_as_there_are_segments_is_no_change(world_and_styles: tuple[World, list[np.ndarray]]) -> None:
    world, _ = world_and_styles
    for name, taste in world.categories.items():
        again = world
        for _ in range(taste.driver.n_segments):
            again = again.shift([name], "swap")
        np.testing.assert_array_equal(again.categories[name].tastes, taste.tastes)


def test_unknown_categories_are_refused(world_and_styles: tuple[World, list[np.ndarray]]) -> None:
    world, _ = world_and_styles
    with pytest.raises(UnknownCategory, match=r"'boats'.*seating.*No taste was changed"):
        world.shift(["boats"], "swap")
    with pytest.raises(NotEnoughCategories, match=r"7 categories.*the world has 6"):
        world.draw_categories(7, np.random.default_rng(0))


@given(
    st.fixed_dictionaries({slot: st.sampled_from(words) for slot, words in VOCABULARY.items()}), st.text(max_size=40)
)
@settings(max_examples=60, deadline=None)
def test_a_style_depends_on_the_slot_words_alone(words: dict[str, str], caption: str) -> None:
    style = style_of(Prompt(caption=caption, **words))
    np.testing.assert_array_equal(style, style_of(Prompt(caption="x", **words)))
    assert style.shape == (N_STYLE_DIMS,)
    read_back = Prompt.parse(Prompt(caption=caption, **words).text)
    np.testing.assert_array_equal(style, style_of(read_back))


def test_scenes_move_a_style_more_than_props() -> None:
    base = Prompt("x", "photo studio", "warm", "golden hour", "no props", "centred")
    scene = Prompt("x", "pine forest", "warm", "golden hour", "no props", "centred")
    prop = Prompt("x", "photo studio", "warm", "golden hour", "confetti", "centred")
    moved = [float(np.linalg.norm(style_of(p) - style_of(base))) for p in (scene, prop)]
    assert moved[0] > 2 * moved[1]
