"""The benchmark of the offline half: all of its models on a small world, and figures over seeds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.offline import Figures, OfflineRun, measure_models, over_figures
from benchmarks.reward import RewardWorld
from benchmarks.worlds import bench_world
from generator.procedural import ProceduralRenderer
from offline.settings import GroupDpoSettings, OfflineSettings, PretrainSettings, RewardSettings, TupleSettings
from online.settings import EncoderSettings, OnlineSettings
from tests.offline.dpo_world import SMALL

# PEFT 0.21 still asks transformers 5.24 by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

RUN = OfflineRun(
    bench_world(mean_ctr=0.2),
    0,
    n_lessons=2,
    n_prompts=2,
    offline=OfflineSettings(
        held_out_by="product",
        pretrain=PretrainSettings(
            n_rows=1_200,
            learning_rate=8e-3,
            n_prompts=2,
            group_analysis=0,
            behavioural_prediction=0,
            product_comprehension=0,
            n_evaluated=1,
        ),
        reward=RewardSettings(n_steps=20, n_lesson_steps=2, batch_pairs=8, batch_lessons=4),
        tuples=TupleSettings(n_candidates=4, size_px=64, min_win_probability=0.5),
        group_dpo=GroupDpoSettings(n_epochs=1, lora_rank=4),
    ),
    mllm=SMALL,
)
ALIGNED = ("group_dpo", "no_group", "caig")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_models_are_trained_and_measured_on_one_world(reward_world: RewardWorld, tmp_path: Path) -> None:
    online = OnlineSettings(encoders=EncoderSettings(text="hashed", image="hashed"))
    found = measure_models(RUN, reward_world, ProceduralRenderer(), online, tmp_path, seed=101)
    scored = [f"{name}_accuracy" for name in ("grm", "grm_no_group", "caig", "cg4ctr", "oracle")]
    gains = [f"ctr_uplift_{name}" for name in ALIGNED] + [f"ctr_gain_over_{name}" for name in ALIGNED[1:]]
    assert found.intervals.keys() == {*scored, *gains}
    assert all(low <= found.values[name] <= high for name, (low, high) in found.intervals.items())
    assert all(math.isfinite(value) for value in found.values.values())
    assert found.values["oracle_accuracy"] == max(found.values[name] for name in scored) > 0.9
    assert found.values["grm_order_inconsistency"] == 0
    assert {"gap_closed", "dpo_accuracy", "dpo_margin", "ctr_pretrained", "n_held_out_pairs"} <= found.values.keys()
    # Without the group token the groups of a product cannot get prompts of their own.
    for name in ("no_group", "caig"):
        assert found.values[f"own_prompts_{name}"] == 0
        assert found.values[f"own_direction_{name}"] == 0.5
    assert found.values["own_prompts_pretrained"] > 0
    assert found.values["well_formed_pretrained"] > 0.5


def test_figures_have_their_intervals() -> None:
    one = Figures({"grm_accuracy": 0.8, "gap_closed": 0.7}, {"grm_accuracy": (0.75, 0.85)})
    two = Figures({"grm_accuracy": 0.9, "gap_closed": 0.8}, {"grm_accuracy": (0.85, 0.95)})
    alone = over_figures({11: one})
    assert alone.metrics == {
        "grm_accuracy": 0.8,
        "gap_closed": 0.7,
        "grm_accuracy_low": 0.75,
        "grm_accuracy_high": 0.85,
    }
    both = over_figures({11: one, 12: two})
    assert both.metrics["grm_accuracy"] == pytest.approx(0.85)
    assert both.metrics["grm_accuracy_low"] < 0.8  # over two seeds the t-interval is wide, whatever that of each
    assert both.detail["intervals_by_seed"] == {
        "11": {"grm_accuracy": [0.75, 0.85]},
        "12": {"grm_accuracy": [0.85, 0.95]},
    }
    assert both.detail["by_seed"]["12"]["gap_closed"] == 0.8
