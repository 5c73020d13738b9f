"""The chain with the preset `smol`: real pretrained weights, on a subset that a CPU can bear."""

from __future__ import annotations

from pathlib import Path

import pytest

from generator.settings import GeneratorSettings, MllmSettings
from offline.chain import ChainRooms, run_chain
from offline.runs import STEPS
from offline.settings import ChainSettings
from tests.offline import chain_world

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(7_200),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
]


def test_smol_goes_from_a_stream_to_the_gate(tmp_path: Path) -> None:
    chain_world.learn(tmp_path / "pictures", tmp_path / "state", 4_000)
    small = chain_world.settings(tmp_path / "offline")
    settings = small.model_copy(
        update={
            "chain": ChainSettings(min_new_impressions=1_000, torch_threads=1),
            "pretrain": small.pretrain.model_copy(
                # So few steps have to teach it to write: most are of prompts.
                update={
                    "n_rows": 320,
                    "batch_rows": 8,
                    "learning_rate": 5e-4,
                    "prompt_generation": 6.0,
                    "log_steps": 1,
                    "n_evaluated": 2,
                }
            ),
            "tuples": small.tuples.model_copy(update={"n_candidates": 4}),
            "group_dpo": small.group_dpo.model_copy(update={"n_epochs": 1, "learning_rate": 1e-4}),
            "prompt_gate": small.prompt_gate.model_copy(update={"n_groups": 1}),
            "group_gate": small.group_gate.model_copy(update={"n_groups": 1, "n_prompts": 2}),
        }
    )
    rooms = ChainRooms(
        tmp_path / "state",
        chain_world.ONLINE,
        GeneratorSettings(mllm=MllmSettings(preset="smol", max_new_tokens=48)),
        settings,
    )
    records = run_chain(rooms, all_steps=True)
    for record in records:
        seconds = (record.finished_at_ms - record.started_at_ms) / 1_000
        print(f"{record.step}: {record.outcome} in {seconds:.0f} s, {record.reason}, {record.figures}")
    steps = {record.step: record for record in records}
    assert [*steps][:5] == list(STEPS[:5])
    assert all(record.outcome == "built" for record in records[:5])
    # What so few steps teach may not do: the gate says so, and nothing is promoted then.
    assert steps["gate"].outcome in ("passed", "refused")
