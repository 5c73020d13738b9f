from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from generator.group_llava import (
    GroupFeatureMismatch,
    GroupFeatureShapeError,
    GroupLlavaConfig,
    GroupLlavaForConditionalGeneration,
    GroupProjector,
)

PAD, BOS, IMAGE, GROUP = 0, 1, 60, 61
N_IMAGE_TOKENS = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def native() -> LlavaForConditionalGeneration:
    """Return a small LLaVA of transformers' own class, its head not tied to the embeddings, as LLaVA-1.5's is."""
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=16,
                projection_dim=16,
            ),
            text_config=LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=128,
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=2,
            ),
            image_token_index=IMAGE,
            image_seq_length=N_IMAGE_TOKENS,
        )
    ).eval()


@pytest.fixture(scope="module")
def native_folder(native: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    native.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(native_folder: Path) -> GroupLlavaForConditionalGeneration:
    torch.manual_seed(0)
    loaded: GroupLlavaForConditionalGeneration = GroupLlavaForConditionalGeneration.from_pretrained(
        native_folder, config=GroupLlavaConfig.from_pretrained(native_folder, group_token_id=GROUP)
    ).eval()
    return loaded


def batch() -> dict[str, torch.Tensor]:
    """Return two rows of different length, padded on the left: one with a picture, both with a group."""
    ids = torch.tensor([[BOS, GROUP, *[IMAGE] * N_IMAGE_TOKENS, 5, 6, 7], [PAD, PAD, PAD, PAD, BOS, GROUP, 8, 9, 10]])
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": torch.randn(1, 3, 32, 32, generator=generator),
        "group_features": torch.randn(2, 11, 128, generator=generator),
    }


@pytest.mark.parametrize("config_by", ["explicit", "checkpoint"])
def test_a_native_llava_loads_and_lacks_the_group_projector_alone(
    native: LlavaForConditionalGeneration, native_folder: Path, config_by: str
) -> None:
    options = (
        {"config": GroupLlavaConfig.from_pretrained(native_folder, group_token_id=GROUP)}
        if config_by == "explicit"
        else {}
    )
    model, info = GroupLlavaForConditionalGeneration.from_pretrained(native_folder, output_loading_info=True, **options)
    assert info["unexpected_keys"] == set()
    assert info["mismatched_keys"] == set()
    assert info["missing_keys"] == {
        f"model.group_projector.{name}" for name, _ in model.model.group_projector.named_parameters()
    }
    without_group = {
        "input_ids": torch.tensor([[BOS, *[IMAGE] * N_IMAGE_TOKENS, 5, 6]]),
        "pixel_values": batch()["pixel_values"],
    }
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**without_group).logits, native(**without_group).logits)


def test_what_was_saved_is_what_is_loaded(model: GroupLlavaForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded, GroupLlavaForConditionalGeneration)
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    for name, weights in state.items():
        torch.testing.assert_close(again[name], weights, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize(
    ("changes", "n_placeholders", "n_features"),
    [
        ({"group_features": None}, 2, 0),
        ({"group_features": torch.zeros(1, 11, 128)}, 2, 1),
        ({"input_ids": batch()["input_ids"].masked_fill(batch()["input_ids"] == GROUP, 5)}, 0, 2),
    ],
    ids=["placeholders without features", "too few features", "features without placeholders"],
)
def test_placeholders_and_features_are_one_to_one(
    model: GroupLlavaForConditionalGeneration,
    changes: dict[str, torch.Tensor | None],
    n_placeholders: int,
    n_features: int,
) -> None:
    with pytest.raises(GroupFeatureMismatch) as error:
        model(**{**batch(), **changes})
    assert (error.value.n_placeholders, error.value.n_features) == (n_placeholders, n_features)
    with pytest.raises(GroupFeatureMismatch):
        model.generate(**{**batch(), **changes}, max_new_tokens=1)
    # A trainer that fuses head and loss calls the backbone alone.
    with pytest.raises(GroupFeatureMismatch):
        model.base_model(**{**batch(), **changes})


def test_features_of_another_shape_are_refused(model: GroupLlavaForConditionalGeneration) -> None:
    with pytest.raises(GroupFeatureShapeError, match=r"\(2, 10, 128\)"):
        model(**{**batch(), "group_features": torch.zeros(2, 10, 128)})


def test_each_row_reads_its_own_group_in_the_backbone(model: GroupLlavaForConditionalGeneration) -> None:
    inputs = batch()
    changed = inputs["group_features"].clone()
    changed[1] = -changed[1]
    with torch.no_grad():
        before = model.base_model(**inputs).last_hidden_state
        after = model.base_model(**{**inputs, "group_features": changed}).last_hidden_state
    torch.testing.assert_close(after[0], before[0])
    assert (after[1, -1] - before[1, -1]).abs().max() > 1e-3


def test_the_scale_is_that_of_what_sets_groups_apart() -> None:
    torch.manual_seed(0)
    projector = GroupProjector(GroupLlavaConfig(text_config=LlamaConfig(hidden_size=32)))
    shared = torch.randn(11, 128)
    features = shared + 0.05 * torch.randn(200, 1, 128)  # the points of a group lie close together
    apart = [_relative_spread(projector.norm(features.flatten(1)))]
    projector.fit_scale(features)
    normed = projector.norm(features.flatten(1))
    apart.append(_relative_spread(normed))
    assert apart[0] < 0.06
    assert apart[1] > 0.99
    torch.testing.assert_close(normed.mean(dim=0), torch.zeros(11 * 128), rtol=0, atol=1e-3)
    torch.testing.assert_close(normed.std(dim=0, correction=0), torch.ones(11 * 128), rtol=0, atol=0.01)
    # An encoder that drifts in scale alone changes nothing.
    torch.testing.assert_close(projector(3 * features), projector(features), rtol=0, atol=1e-2)
    projector.fit_scale(shared.expand(5, 11, 128))
    assert torch.isfinite(projector(features)).all()


def _relative_spread(inputs: torch.Tensor) -> float:
    """Return what rows differ by, as a share of what they are, root mean square."""
    apart: torch.Tensor = (inputs - inputs.mean(dim=0)).square().mean() / inputs.square().mean()
    return float(apart.detach().sqrt())


def test_the_group_tokens_embedding_is_the_mlps(model: GroupLlavaForConditionalGeneration) -> None:
    # The placeholder's own embedding must play no part.
    inputs = batch()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        before = model(**inputs).logits
        kept = table[GROUP].clone()
        table[GROUP] += 10.0
        after = model(**inputs).logits
        table[GROUP] = kept
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_in_a_batch_is_generate_one_by_one(model: GroupLlavaForConditionalGeneration, use_cache: bool) -> None:
    inputs = batch()
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "suppress_tokens": [GROUP, 2]}
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row in range(2):
        real = inputs["attention_mask"][row] == 1
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "attention_mask": inputs["attention_mask"][row : row + 1, real],
            "group_features": inputs["group_features"][row : row + 1],
            **({"pixel_values": inputs["pixel_values"]} if row == 0 else {}),
        }
        by_itself = model.generate(**alone, **options)[:, alone["input_ids"].shape[1] :]
        assert together[row].tolist() == by_itself[0].tolist()


def test_several_samples_keep_their_rows_group(model: GroupLlavaForConditionalGeneration) -> None:
    inputs = batch()
    options = {"max_new_tokens": 3, "suppress_tokens": [GROUP, 2]}
    beams = model.generate(**inputs, **options, num_beams=3, num_return_sequences=3)
    alone = model.generate(
        input_ids=inputs["input_ids"][1:, 4:],
        group_features=inputs["group_features"][1:],
        **options,
        num_beams=3,
        num_return_sequences=3,
    )
    assert beams[3:, 9:].tolist() == alone[:, 5:].tolist()
