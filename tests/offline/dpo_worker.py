"""One process of an alignment under torchrun: writes what it lost at each step."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from offline.group_dpo import PROGRESS_FILE, align
from tests.offline import dpo_world

if __name__ == "__main__":
    folder, batch_tuples, robust_step = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    settings = dpo_world.SHORT.model_copy(update={"batch_tuples": batch_tuples, "robust_step": robust_step})
    rank = int(os.environ["RANK"])
    (folder / str(rank)).mkdir()
    rows = dpo_world.tuples(dpo_world.products(folder / str(rank)))
    report = align(dpo_world.mllm(), rows, settings, folder=folder / "out", seed=0)
    if rank == 0:
        lines = [json.loads(line) for line in (folder / "out" / PROGRESS_FILE).read_text().splitlines()]
        result = {
            "world_size": int(os.environ["WORLD_SIZE"]),
            "n_processes": report.n_processes,
            "losses": [line["loss"] for line in lines if "loss" in line],
        }
        (folder / "result.json").write_text(json.dumps(result))
