"""The gated form: products can be told which attribute decides, and nothing else changes by it."""

from __future__ import annotations

import pytest
import torch

from online.gated import HEEDED_SHARE, GatedModel
from online.model import weight_decays
from online.settings import ModelSettings

CARDINALITIES = (3, 4, 5, 2)
DIM, N_PRODUCTS = 24, 12
SETTINGS = ModelSettings(d_model=16, d_field=4, d_hidden=16)


def model(seed: int = 0) -> GatedModel:
    torch.manual_seed(seed)
    made = GatedModel(CARDINALITIES, DIM, DIM, SETTINGS)
    made.fit_features(titles(), titles())
    return made


def titles() -> torch.Tensor:
    return torch.randn(N_PRODUCTS, DIM, generator=torch.Generator().manual_seed(7))


def chosen() -> torch.Tensor:
    return torch.arange(N_PRODUCTS) < 4


def shares(of: GatedModel) -> torch.Tensor:
    with torch.no_grad():
        return of.titles(titles()).field_weights / len(CARDINALITIES)


@pytest.mark.parametrize("field", range(len(CARDINALITIES)))
def test_products_heed_what_they_are_told_and_the_others_stay_as_they_are(field: int) -> None:
    gated = model()
    before = shares(gated)
    gated.heed(titles(), chosen(), field, model(1))
    after = shares(gated)
    assert (gated.heeded_fields(titles()[chosen()]) == field).all()
    assert after[chosen(), field].min() > HEEDED_SHARE - 0.05
    assert (after - before)[~chosen()].abs().max() < 0.03


def test_a_gate_that_has_settled_on_another_attribute_is_turned() -> None:
    gated = model()
    gated.heed(titles(), chosen(), 1, model(1))
    gated.heed(titles(), chosen(), 2, model(2))
    assert (gated.heeded_fields(titles()[chosen()]) == 2).all()
    assert shares(gated)[chosen(), 1].max() < 0.05


def test_told_twice_is_told_once() -> None:
    gated = model()
    gated.heed(titles(), chosen(), 3, model(1))
    once, embedded = shares(gated), gated.fields.weight.detach().clone()
    gated.heed(titles(), chosen(), 3, model(2))
    assert torch.allclose(shares(gated), once, atol=0.03)
    assert torch.equal(gated.fields.weight, embedded)


def test_an_attribute_is_embedded_afresh_only_where_no_other_product_heeds_it() -> None:
    gated = model()
    embedded = gated.fields.weight.detach().clone()
    gated.heed(titles(), chosen(), 0, model(1))  # a new gate is nearly flat: every product heeds everything a little
    assert torch.equal(gated.fields.weight, embedded)
    gated.heed(titles(), ~chosen(), 1, model(1))
    embedded = gated.fields.weight.detach().clone()
    gated.heed(titles(), chosen(), 2, model(3))
    rows = torch.zeros(len(embedded), dtype=torch.bool)
    rows[sum(CARDINALITIES[:2]) : sum(CARDINALITIES[:3])] = True
    assert not torch.equal(gated.fields.weight[rows], embedded[rows])
    assert torch.equal(gated.fields.weight[~rows], embedded[~rows])


def test_no_gradient_and_no_decay_moves_what_was_told() -> None:
    gated = model()
    assert not any(parameter.requires_grad for parameter in gated.evidence.parameters())
    decays = weight_decays(gated, SETTINGS)
    places = dict(zip(*_starts(gated), strict=True))
    start = places["evidence.weight"]
    assert (decays[start : start + gated.evidence.weight.numel()] == 0).all()
    start = places["fields.weight"]
    assert (decays[start : start + gated.fields.weight.numel()] == SETTINGS.user_weight_decay).all()


def _starts(gated: GatedModel) -> tuple[list[str], list[int]]:
    names, starts, start = [], [], 0
    for name, parameter in gated.named_parameters():
        names.append(name)
        starts.append(start)
        start += parameter.numel()
    return names, starts
