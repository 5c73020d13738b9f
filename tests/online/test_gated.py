"""The gated form: products can be told which attribute decides, and nothing else changes by it."""

from __future__ import annotations

import pytest
import torch

from online.encoders import IMAGE_TOKENS, TITLE_TOKENS
from online.forms import preference_model
from online.gated import HEEDED_SHARE, IDLE_WEIGHT, GatedModel
from online.model import weight_decays
from online.settings import ModelForm, ModelSettings

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


def likeness(field: int, n_axes: int = 3) -> torch.Tensor:
    """Values of an attribute, even ones here and odd ones there, each a little beside the others of its kind."""
    n_values = CARDINALITIES[field]
    placed = 0.05 * torch.randn(n_values, n_axes, generator=torch.Generator().manual_seed(field))
    placed[:, 0] += 2.0 * (torch.arange(n_values) % 2) - 1
    return placed


def shares(of: GatedModel) -> torch.Tensor:
    with torch.no_grad():
        return of.titles(titles()).field_weights / len(CARDINALITIES)


@pytest.mark.parametrize("field", range(len(CARDINALITIES)))
def test_products_heed_what_they_are_told_and_the_others_stay_as_they_are(field: int) -> None:
    gated = model()
    before = shares(gated)
    gated.heed(titles(), chosen(), field, likeness(field), model(1))
    after = shares(gated)
    assert (gated.heeded_fields(titles()[chosen()]) == field).all()
    assert after[chosen(), field].min() > HEEDED_SHARE - 0.05
    assert (after - before)[~chosen()].abs().max() < 0.03


def test_a_gate_that_has_settled_on_another_attribute_is_turned() -> None:
    gated = model()
    gated.heed(titles(), chosen(), 1, likeness(1), model(1))
    gated.heed(titles(), chosen(), 2, likeness(2), model(2))
    assert (gated.heeded_fields(titles()[chosen()]) == 2).all()
    assert shares(gated)[chosen(), 1].max() < 0.05


def test_told_twice_is_told_once() -> None:
    gated = model()
    gated.heed(titles(), chosen(), 3, likeness(3), model(1))
    once, embedded = shares(gated), gated.fields.weight.detach().clone()
    gated.heed(titles(), chosen(), 3, likeness(3), model(2))
    assert torch.allclose(shares(gated), once, atol=0.03)
    assert torch.equal(gated.fields.weight, embedded)


def test_an_attribute_is_embedded_afresh_only_where_no_other_product_heeds_it() -> None:
    gated = model()
    embedded = gated.fields.weight.detach().clone()
    gated.heed(
        titles(), chosen(), 0, likeness(0), model(1)
    )  # a new gate is nearly flat: every product heeds everything a little
    assert torch.equal(gated.fields.weight, embedded)
    gated.heed(titles(), ~chosen(), 1, likeness(1), model(1))
    embedded = gated.fields.weight.detach().clone()
    gated.heed(titles(), chosen(), 2, likeness(2), model(3))
    rows = torch.zeros(len(embedded), dtype=torch.bool)
    rows[sum(CARDINALITIES[:2]) : sum(CARDINALITIES[:3])] = True
    assert not torch.equal(gated.fields.weight[rows], embedded[rows])
    assert torch.equal(gated.fields.weight[~rows], embedded[~rows])


def idle(field: int) -> GatedModel:
    """A model of which every other product heeds another attribute, so that this one can start anew."""
    gated = model()
    other = (field + 1) % len(CARDINALITIES)
    gated.heed(titles(), ~chosen(), other, likeness(other), model(1))
    return gated


def rows_of(field: int) -> slice:
    return slice(sum(CARDINALITIES[:field]), sum(CARDINALITIES[: field + 1]))


@pytest.mark.parametrize("n_axes", [1, 3])
@pytest.mark.parametrize("field", range(len(CARDINALITIES)))
def test_values_start_where_they_were_clicked_alike(field: int, n_axes: int) -> None:
    gated, placed = idle(field), likeness(field, n_axes)
    gated.heed(titles(), chosen(), field, placed, model(3))
    embedded = gated.fields.weight.detach()[rows_of(field)]
    # Directions are as many as a new model's values span.
    placed = placed[:, : min(n_axes, CARDINALITIES[field])]
    expected = torch.pdist(placed)
    assert torch.allclose(torch.pdist(embedded) / torch.pdist(embedded).max(), expected / expected.max(), atol=1e-4)


@pytest.mark.parametrize("field", range(len(CARDINALITIES)))
def test_an_attribute_starts_on_the_scale_of_those_that_are_heeded_and_leaves_all_others(field: int) -> None:
    gated = idle(field)
    with torch.no_grad():
        gated.fields.weight.mul_(0.2)  # as small as those of attributes that gates multiply
        gated.user_linear.weight.mul_(0.5)
    before = {name: parameter.detach().clone() for name, parameter in gated.named_parameters()}
    heeds = shares(gated)[~chosen()].amax(dim=0) * len(CARDINALITIES) >= IDLE_WEIGHT
    gated.heed(titles(), chosen(), field, 40 * likeness(field), model(3))
    owners = gated.field_of_parameter()
    start = 0
    for name, parameter in gated.named_parameters():
        own = (owners[start : start + parameter.numel()] == field).reshape(parameter.shape)
        start += parameter.numel()
        if name.startswith("evidence"):
            continue
        assert torch.equal(parameter[~own], before[name][~own]), name
        if own.any():
            assert not torch.equal(parameter[own], before[name][own]), name
            like = torch.isin(owners[start - parameter.numel() : start], torch.nonzero(heeds)[:, 0])
            expected = before[name][like.reshape(parameter.shape)].square().mean().sqrt()
            assert parameter[own].square().mean().sqrt().item() == pytest.approx(expected.item(), rel=1e-3), name


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


@pytest.mark.parametrize("n_users", [1, 3, 40])
def test_users_are_the_same_whether_anything_is_learnt_of_them_or_not(n_users: int) -> None:
    gated = model()
    rng = torch.Generator().manual_seed(n_users)
    attributes = torch.stack([torch.randint(n, (n_users,), generator=rng) for n in CARDINALITIES], dim=1)
    title_index = torch.randint(N_PRODUCTS, (n_users,), generator=rng)
    learnt = gated.users(attributes, gated.titles(titles()), title_index)
    with torch.inference_mode():
        looked_up = gated.users(attributes, gated.titles(titles()), title_index)
        gated.freeze()
        frozen = gated.users(attributes, gated.titles(titles()), title_index)
    assert learnt.requires_grad
    assert torch.allclose(learnt, looked_up, atol=1e-5)
    assert (frozen == looked_up).all()


@pytest.mark.parametrize("form", ["shipped", "paper"])
def test_all_users_by_all_creatives_are_the_logits_of_each(form: ModelForm) -> None:
    torch.manual_seed(0)
    settings = SETTINGS.model_copy(update={"form": form})
    made = preference_model(CARDINALITIES, TITLE_TOKENS * DIM, IMAGE_TOKENS * DIM, settings).eval()
    with torch.inference_mode():
        one_title = made.titles(torch.randn(1, TITLE_TOKENS * DIM))
        images = made.images(torch.randn(4, IMAGE_TOKENS * DIM))
        e_ut = made.users(torch.tensor([[0, 1, 2, 1], [2, 3, 4, 0], [1, 0, 0, 0]]), one_title, torch.zeros(3).long())
        crossed = made.cross(e_ut, one_title, images)
        users, creatives = torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3)
        each = made(e_ut[users], one_title, torch.zeros(12).long(), images, creatives).reshape(3, 4)
    assert torch.allclose(crossed, each, atol=1e-5)
