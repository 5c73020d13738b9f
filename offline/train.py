"""Training of one step from the newest artifacts, by one process or by several that train together."""

from __future__ import annotations

from typing import Any, Final, Literal

from offline.rebuild import KIND as DATASET_KIND
from offline.steps import BASE_KIND, Workshop, grm_step, group_dpo_step, pretrain_step
from offline.tuples import KIND as TUPLES_KIND
from state.artifact import Artifact

TrainedStep = Literal["pretrain", "grm", "group-dpo"]

_MAKER: Final = {
    DATASET_KIND: "osmf offline run",
    BASE_KIND: "osmf offline train pretrain",
    TUPLES_KIND: "osmf offline run --all",
}


class NothingToTrainFrom(RuntimeError):
    """A step that lacks an artifact."""

    def __init__(self, step: str, kind: str, preset: str | None) -> None:
        of_preset = "" if preset is None else f" of the preset {preset!r}"
        super().__init__(
            f"{step} is trained from the newest artifact {kind!r}{of_preset}, and there is none. Nothing was trained; "
            f"`{_MAKER[kind]}` makes one."
        )


class ShardingRefused(RuntimeError):
    """A step whose model must not be spread over processes."""

    def __init__(self, step: str) -> None:
        super().__init__(
            f"accelerate's configuration spreads the model over the processes (FSDP); allowed is that for pretrain, "
            f"which trains all of the model's weights. Nothing was trained: for {step} take --accelerate-config "
            "lora-ddp, or --launcher torchrun."
        )


def train_step(step: TrainedStep, shop: Workshop) -> Artifact:
    """Train one step from the newest artifacts and return the one that it made, or finds made from exactly the same.

    Where G-MLLMs of several presets are there, those of the set one count.

    Raises
    ------
    NothingToTrainFrom
        If an artifact is missing.
    ShardingRefused
        If the step's model must not be spread over processes, and is to be.
    """
    if shop.processes.shards and step != "pretrain":
        raise ShardingRefused(step)
    preset = shop.generator.mllm.preset

    def of_preset(found: Artifact) -> bool:
        return _preset(shop, found) == preset

    def newest(kind: str, *, of_any_preset: bool = False) -> Artifact:
        found = shop.artifacts.latest(kind) if of_any_preset else shop.artifacts.latest(kind, of_preset)
        if found is None:
            raise NothingToTrainFrom(step, kind, None if of_any_preset else preset)
        return found

    if step == "group-dpo":
        tuples = newest(TUPLES_KIND)
        policy = shop.artifacts.named(tuples.manifest.made_from["mllm"])
        assert policy is not None
        return group_dpo_step(shop, tuples, policy)
    dataset = newest(DATASET_KIND, of_any_preset=True)
    if step == "pretrain":
        return pretrain_step(shop, dataset)
    return grm_step(shop, dataset, newest(BASE_KIND))


def _preset(shop: Workshop, artifact: Artifact | None) -> str | None:
    """Return the preset of the G-MLLM that an artifact is, or was made by; None where it is gone."""
    if artifact is None:
        return None
    mllm: Any = artifact.manifest.made_from["mllm"]  # the settings of a pre-trained one, the name of another's
    return _preset(shop, shop.artifacts.named(mllm)) if isinstance(mllm, str) else str(mllm["preset"])
