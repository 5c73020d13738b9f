"""The average of the weights: a span that grows with the steps, and starts anew for an attribute alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from online.averaging import WeightAverage
from online.encoders import IMAGE_TOKENS, TITLE_TOKENS
from online.forms import preference_model
from online.model import FlatParameters, PreferenceModel
from online.settings import ModelForm, ModelSettings

N_FIELDS = 3
OWNERS = torch.tensor([0, 1, 2, 3, 1])
"""Weights of three attributes, one of them shared."""

SHARED = 3


def rates(averaging: WeightAverage, n_steps: int) -> list[float]:
    """Return how much of each weight step ``n_steps`` takes over."""
    average = torch.zeros(len(OWNERS))
    averaging.add(average, torch.ones(len(OWNERS)), n_steps)
    return average.tolist()


@pytest.mark.parametrize(
    ("n_steps", "rate"),
    [
        pytest.param(1, 0.8, id="the first step: of 1.25 steps"),
        pytest.param(4, 0.5, id="of two"),
        pytest.param(40, 1 / 11, id="a quarter of all steps and one"),
        pytest.param(396, 0.01, id="the last before there are as many as are wanted"),
        pytest.param(400, 0.01, id="no more than are wanted"),
        pytest.param(100_000, 0.01, id="whatever the number of steps"),
    ],
)
def test_a_step_counts_as_one_of_a_quarter_of_all_steps(n_steps: int, rate: float) -> None:
    assert rates(WeightAverage(OWNERS, N_FIELDS, 100), n_steps) == pytest.approx([rate] * len(OWNERS))


@pytest.mark.parametrize("ema_steps", [1, 8])
def test_the_average_moves_in_place_by_its_rate(ema_steps: int) -> None:
    average, weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    expected = average + (weights - average) / min(ema_steps, 3)
    WeightAverage(OWNERS, N_FIELDS, ema_steps).add(average, weights, 8)
    assert average.tolist() == pytest.approx(expected.tolist())
    assert weights.tolist() == [5, 4, 3, 2, 1]


def test_an_attribute_that_starts_anew_leaves_the_rates_of_the_others_and_of_what_is_shared() -> None:
    averaging = WeightAverage(OWNERS, N_FIELDS, 100)
    averaging.restart([1], 200)
    assert rates(averaging, 201) == pytest.approx([1 / 51.25, 0.8, 1 / 51.25, 1 / 51.25, 0.8])
    assert rates(averaging, 204) == pytest.approx([1 / 52, 0.5, 1 / 52, 1 / 52, 0.5])
    averaging.restart([0, 1], 300)
    assert rates(averaging, 304) == pytest.approx([0.5, 0.5, 1 / 77, 1 / 77, 0.5])
    # In the end all are averaged over as many steps as are wanted.
    assert rates(averaging, 900) == pytest.approx([0.01] * len(OWNERS))
    assert averaging.since == [300, 300, 0, 0]
    averaging.restart([], 950)
    assert averaging.since == [300, 300, 0, 0]


# --- Which weights belong to an attribute

CARDINALITIES = (3, 2, 4)
DIM = 6
N_USERS = 24


def made(form: ModelForm) -> PreferenceModel:
    torch.manual_seed(0)
    settings = ModelSettings(form=form, d_model=8, d_field=2, d_hidden=10, n_heads=2)
    tokens = (TITLE_TOKENS, IMAGE_TOKENS) if form == "paper" else (1, 1)
    return preference_model(CARDINALITIES, tokens[0] * DIM, tokens[1] * DIM, settings).eval()


def users(model: PreferenceModel, attributes: Tensor, form: ModelForm) -> Tensor:
    n_tokens = TITLE_TOKENS if form == "paper" else 1
    titles = model.titles(torch.randn(1, n_tokens * DIM, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        return model.users(attributes, titles, torch.zeros(len(attributes), dtype=torch.int64))


FORMS: tuple[ModelForm, ...] = ("shipped", "paper")


@pytest.mark.parametrize("form", FORMS)
def test_an_attributes_own_weights_are_its_embeddings_and_the_columns_that_read_them(form: ModelForm) -> None:
    model = made(form)
    owners, start = model.field_of_parameter(), 0
    assert owners.shape == FlatParameters(made(form)).vector.shape
    n_readers = 10 + (8 if form == "shipped" else 0)  # rows of the MLP's first layer, and of the linear path
    n_own = [2 * cardinality + 2 * n_readers for cardinality in CARDINALITIES]
    assert torch.bincount(owners)[:N_FIELDS].tolist() == n_own
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = owners[start : start + parameter.numel()].reshape(parameter.shape)
        start += parameter.numel()
    assert found["fields.weight"].tolist() == [[0, 0]] * 3 + [[1, 1]] * 2 + [[2, 2]] * 4
    readers = {"user.0.weight", "user_linear.weight"} & found.keys()
    assert len(readers) == (2 if form == "shipped" else 1)
    for name in readers:
        assert (found[name] == torch.tensor([0, 0, 1, 1, 2, 2])).all()
    others = found.keys() - readers - {"fields.weight"}
    assert all((found[name] == SHARED).all() for name in others)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("field", range(N_FIELDS))
def test_without_its_own_weights_an_attribute_says_nothing_and_without_the_others_it_alone_does(
    form: ModelForm, field: int
) -> None:
    rng = torch.Generator().manual_seed(2)
    attributes = torch.stack([torch.randint(n, (N_USERS,), generator=rng) for n in CARDINALITIES], dim=1)
    other = attributes.clone()
    other[:, field] = (other[:, field] + 1) % CARDINALITIES[field]
    for silenced, differs in (([field], False), ([each for each in range(N_FIELDS) if each != field], True)):
        model = made(form)
        flat = FlatParameters(model)
        flat.vector[torch.isin(model.field_of_parameter(), torch.tensor(silenced))] = 0
        gaps = (users(model, attributes, form) - users(model, other, form)).abs().amax(dim=1)
        assert bool((gaps > 1e-5).all()) == differs
        assert differs or float(gaps.max()) == 0
