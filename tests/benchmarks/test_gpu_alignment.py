from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_alignment import ON_CPU, Rate, StepMeter, _fitting, bench_alignment
from benchmarks.measured import Measured
from benchmarks.random_mllm import LLAVA_7B, SMALL, random_mllm

# TRL and PEFT look at transformers' deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def measured() -> Measured:
    return bench_alignment(quick=True)


def test_alignment_is_measured_with_the_chains_own_steps(measured: Measured) -> None:
    assert all(value > 0 for value in measured.metrics.values())
    detail = measured.detail["alignment"]
    # Both answers of every tuple, and every picture, of 4 tokens each.
    assert detail["dpo"]["tokens_per_step"] > ON_CPU.batch_tuples * 2 * 4
    assert detail["grm"]["tokens_per_step"] > ON_CPU.batch_pictures * 4


def test_operations_of_a_step_are_those_of_its_matrices(measured: Measured) -> None:
    """Forwards two for each weight and token."""
    model = random_mllm(SMALL, seed=1, dtype=torch.float32, device="cpu").model
    n_weights = sum(weights.numel() for weights in model.model.language_model.layers.parameters())
    grm = measured.detail["alignment"]["grm"]
    per_weight_and_token = grm["tflop_per_step"] * 1e12 / grm["tokens_per_step"] / n_weights
    # Beside the layers there are the tower, the projectors and attention.
    assert 2 < per_weight_and_token < 4


def test_batches_are_halved_until_they_fit() -> None:
    tried = []

    def measure(batch: int) -> int:
        tried.append(batch)
        if batch > 2:
            raise torch.cuda.OutOfMemoryError
        return batch

    assert _fitting(16, measure) == 2
    assert tried == [16, 8, 4, 2]

    def never(batch: int) -> int:
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(torch.cuda.OutOfMemoryError):
        _fitting(4, never)


def test_the_first_step_warms_up_and_the_last_is_counted() -> None:
    mllm = random_mllm(SMALL, seed=1, dtype=torch.float32, device="cpu")
    meter = StepMeter(mllm, 3)
    for _ in range(3):
        meter.begin()
        torch.ones(10, 20) @ torch.ones(20, 30)
        meter.end()
    rate = meter.rate(batch=1)
    assert rate.n_flops == 2 * 10 * 20 * 30
    assert rate.step_s > 0


def test_shares_are_of_the_peak() -> None:
    rate = Rate(batch=1, step_s=2.0, n_tokens=100, n_flops=80)
    assert (rate.tokens_per_s, rate.peak_share(100.0)) == (50.0, 0.4)


def test_the_large_shape_is_that_of_llava_7b() -> None:
    with torch.device("meta"):
        model = random_mllm(LLAVA_7B, seed=1, dtype=torch.bfloat16, device="meta").model
    parts = {
        "language": [*model.model.language_model.parameters(), *model.lm_head.parameters()],
        "vision": [*model.model.vision_tower.parameters()],
    }
    n_weights = {part: sum(weights.numel() for weights in found) for part, found in parts.items()}
    # Of llava-hf/llava-1.5-7b-hf: Vicuna-7B with 64 rows more in its embeddings, and CLIP-L/14 at 336 px.
    assert n_weights == {"language": 6_738_939_904, "vision": 303_507_456}
