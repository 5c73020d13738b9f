"""The champion's models are exchanged as a whole; one that cannot be used changes nothing and is told."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from generator.champion import Champion, ChampionPointer
from generator.champion_models import ChampionWatch, load_models
from generator.creative_scorer import Audience, Candidate
from generator.grm import Grm
from generator.mllm_presets import build_mllm
from generator.settings import MllmSettings, TinyMllmSettings
from state.artifact import ArtifactStore

SMALL = MllmSettings(
    group_hidden_size=32,
    max_new_tokens=8,
    tiny=TinyMllmSettings(
        eyes="learnt",
        hidden_size=48,
        n_layers=2,
        n_heads=2,
        vision_hidden_size=16,
        n_vision_layers=1,
        image_px=32,
        patch_px=16,
    ),
)
FEATURE = np.random.default_rng(0).normal(size=(11, 128)).astype(np.float32)
PICTURE = Image.new("RGB", (40, 30), "red")


def champion(number: int) -> Champion:
    return Champion(
        mllm=f"mllm/v{number:06}",
        grm=f"grm/v{number:06}",
        grm_accuracy=0.75,
        n_grm_pairs=10**9,
        promoted_at_ms=number,
        reason="better",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two versions of both models."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (1, 2):
        mllm = build_mllm(SMALL, seed=seed)
        with ArtifactStore(folder).write("mllm", created_at_ms=0) as draft:
            mllm.save(draft.path)
        with ArtifactStore(folder).write("grm", created_at_ms=0) as draft:
            Grm(mllm).save(draft.path)
    return folder


@pytest.fixture
def models_dir(tmp_path: Path, trained: Path) -> Path:
    """The same artifacts, with a pointer of the test's own."""
    for kind in ("mllm", "grm"):
        (tmp_path / kind).mkdir()
        for version in (trained / kind).iterdir():
            (tmp_path / kind / version.name).mkdir()
            for file in version.iterdir():
                (tmp_path / kind / version.name / file.name).hardlink_to(file)
    return tmp_path


def test_models_change_with_the_pointer_and_a_bad_champion_changes_nothing(
    models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pointer = ChampionPointer(models_dir)
    watch = ChampionWatch(pointer, partial(load_models, models_dir, SMALL))
    assert watch.current() is None
    pointer.move(champion(1))
    first = watch.current()
    assert first is not None
    assert (first.writer.name, first.scorer.name) == ("mllm/v000001", "grm/v000001")
    assert first.r == pytest.approx(math.sin(math.pi / 4), abs=1e-3)
    assert watch.current() is first

    pointer.move(champion(3))
    assert watch.current() is first
    assert watch.current() is first
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "the champion mllm/v000003 with grm/v000003 cannot be used" in told
    assert "mllm/v000003 is not there" in told
    assert "mllm/v000001 stays" in told

    pointer.move(champion(2))
    second = watch.current()
    assert second is not None
    assert second.writer.name == "mllm/v000002"
    pointer.roll_back()
    pointer.roll_back()
    third = watch.current()
    assert third is not None
    assert third.champion == champion(1)

    pointer.path.write_text("no pointer")
    assert watch.current() is third


def test_a_damaged_model_is_never_loaded(models_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = models_dir / "grm" / "v000001" / "heads.pt"
    payload = bytearray(weights.read_bytes())
    payload[100] ^= 1
    weights.unlink()
    weights.write_bytes(payload)
    pointer = ChampionPointer(models_dir)
    pointer.move(champion(1))
    assert ChampionWatch(pointer, partial(load_models, models_dir, SMALL)).current() is None
    assert "heads.pt is corrupt" in caplog.text
    assert "Until then the grammar writes prompts" in caplog.text


def test_loaded_models_write_and_rank_and_repeat_themselves(models_dir: Path) -> None:
    models = load_models(models_dir, SMALL, champion(1))
    again = load_models(models_dir, SMALL, champion(1))
    features = {3: FEATURE, 5: -FEATURE}
    written = [each.writer.write("Lamp", PICTURE, features, n_prompts=3, seed=4) for each in (models, again)]
    assert written[0] == written[1]
    assert list(written[0]) == [3, 5]
    audience = Audience("p0", "Lamp", 3, FEATURE)
    pictures = [Candidate("", PICTURE), Candidate("", Image.new("RGB", (40, 30), "blue"))]
    scores = models.scorer.score_many(audience, pictures)
    assert scores == pytest.approx(again.scorer.score_many(audience, pictures))
    assert scores.sum() == pytest.approx(0.0, abs=1e-9)
