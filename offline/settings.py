"""Settings of the offline jobs: what they write, how often, and what counts as enough evidence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

Preset = Literal["tiny", "smol", "llava"]
"""What a G-MLLM is made of, `generator.mllm.preset`."""

DPO_LEARNING_RATES: Final[Mapping[Preset, float]] = {"tiny": 2e-3, "smol": 2e-4, "llava": 2e-5}
"""Learning rates of Group-DPO by preset: the larger a model, the smaller the steps that it bears."""


class EndpointSettings(BaseModel):
    """A chat model behind an endpoint that speaks OpenAI's protocol."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = Field(
        None, min_length=1, description="Base URL, such as http://127.0.0.1:8000/v1; none: no such model is asked."
    )
    model: str = Field("gpt-4o", min_length=1, description="The model's name at the endpoint.")
    api_key: SecretStr = Field(SecretStr(""), description="Bearer token; empty: none is sent.")
    timeout_s: float = Field(60.0, gt=0, description="Longest wait for an answer, s.")


class TeacherSettings(EndpointSettings):
    """Who writes the prompts that pre-training imitates: an endpoint, or without one a built-in grammar."""

    temperature: float = Field(
        1.0, gt=0, le=4, description="How much the prompts of one group differ, of either teacher."
    )


class PretrainSettings(BaseModel):
    """Pre-training of the G-MLLM on its four tasks (sections 3.3 and A.3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_rows: int = Field(6_000, ge=1, description="Instructions that are drawn.")
    n_epochs: float = Field(1.0, gt=0, description="Passes over them; the paper's are 10.")
    batch_rows: int = Field(8, ge=1, description="Instructions of one step on one device.")
    n_accumulated: int = Field(1, ge=1, description="Batches whose gradients make one step, on each device.")
    activation_checkpointing: bool = Field(
        False, description="Whether activations are computed again for the gradient: slower, for models of billions."
    )
    learning_rate: float = Field(
        2e-3, gt=0, description="Peak of the cosine schedule; the paper's for a whole LLaVA is 2e-6."
    )
    warmup_share: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay.")
    max_gradient: float = Field(1.0, gt=0, description="Norm to which a step's gradient is cut.")
    n_prompts: int = Field(8, ge=1, description="Different prompts that the teacher writes for each group.")
    p_without_group: float = Field(
        0.15, ge=0, lt=1, description="Share of the rows about users that come without a group token."
    )
    group_analysis: float = Field(1.0, ge=0, description="Weight of the task in the draws.")
    behavioural_prediction: float = Field(0.5, ge=0, description="Weight of the task in the draws.")
    product_comprehension: float = Field(1.0, ge=0, description="Weight of the task in the draws.")
    prompt_generation: float = Field(2.5, gt=0, description="Weight of the task in the draws.")
    checkpoint_steps: int = Field(100, ge=1, description="Steps between checkpoints, from which a killed run goes on.")
    log_steps: int = Field(10, ge=1, description="Steps between lines of progress.")
    n_evaluated: int = Field(64, ge=1, description="Groups, at most, whose prompts are generated and read afterwards.")
    teacher: TeacherSettings = Field(TeacherSettings(), description="Who writes the prompts.")


class RewardSettings(BaseModel):
    """How reward models are trained: the GRM, and those that it is compared with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_steps: int = Field(240, ge=1, description="Steps on pairs.")
    layer: int = Field(
        0,
        description="Layer of the language model whose states of a picture the GRM compares: 0 for its inputs, -1 for "
        "its last one, which a small language model does not see more by.",
    )
    n_lesson_steps: int = Field(
        300,
        ge=0,
        description="Steps before those, in which a G-MLLM whose eyes learn is taught to name what a picture shows; "
        "behind frozen eyes the projector is fitted instead.",
    )
    lesson_learning_rate: float = Field(1e-3, gt=0, description="Highest learning rate of the lessons.")
    lesson_weight_decay: float = Field(0.05, ge=0, description="Weight decay of the lessons.")
    n_lesson_pictures: int = Field(
        300,
        ge=0,
        description="Pictures drawn for lessons from random prompts, of products that are learnt from, besides "
        "their creatives.",
    )
    batch_pairs: int = Field(128, ge=1, description="Pairs in a step.")
    batch_lessons: int = Field(32, ge=1, description="Pictures in a step of the lessons.")
    learning_rate: float = Field(1e-2, gt=0, description="Highest learning rate on pairs.")
    weight_decay: float = Field(
        6.0,
        ge=0,
        description="Weight decay on pairs: strong, for products and groups are few, and tastes have few directions.",
    )
    calibration_share: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="Share of the products learnt from that a first model does not see, for the temperature to be "
        "fitted to; the model itself then learns from all. With 0 it is fitted to what was learnt.",
    )


class TupleSettings(BaseModel):
    """Preference tuples: what the G-MLLM proposes for a group, drawn, and ranked by a scorer (section 3.3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_candidates: int = Field(
        8,
        ge=2,
        description="Prompts that the G-MLLM writes for each group; those of all groups of a product are candidates of "
        "each.",
    )
    n_pairs: int = Field(
        8, ge=1, description="Tuples of a group at most: best and worst, then second best and second worst, and so on."
    )
    min_win_probability: float = Field(
        0.6, ge=0.5, lt=1, description="Tuples whose winner is less likely to be clicked more are dropped."
    )
    size_px: int = Field(256, ge=64, le=4096, description="Side of the pictures that are drawn for the scorer, pixels.")
    batch_rows: int = Field(64, ge=1, description="Prompts that are written at once.")


class PromptGateSettings(BaseModel):
    """What generated prompts must be like for a newly aligned G-MLLM to be used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_groups: int = Field(64, ge=1, description="Groups, at most, whose prompts are generated and read.")
    min_well_formed: float = Field(
        0.8, ge=0, le=1, description="Least share of prompts of ours, word for word; junk has none."
    )
    max_loss: float = Field(
        0.05,
        ge=0,
        le=1,
        description="How far the share of well-formed prompts may fall below that of the model before.",
    )
    min_group_specific: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Least share of pairs of a product's groups that get different words, where groups are used.",
    )
    min_distinct_kept: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Least ratio of different choices of words to the model's before; less is one answer to all.",
    )


class GroupDpoSettings(BaseModel):
    """Group-DPO: the alignment of the G-MLLM with the preferences of groups (Eq. 9)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    with_group: bool = Field(
        True, description="Whether prompts are written for a group; false is the paper's variant without group token."
    )
    beta: float = Field(0.1, gt=0, description="How strongly the reference holds: beta of Eq. 9.")
    sft_weight: float = Field(
        1.5,
        ge=0,
        description="Weight of the winner's negative log-likelihood per token beside Eq. 9; 0 is the paper's loss, "
        "more keeps prompts from turning into junk.",
    )
    confidence_weights: bool = Field(
        False,
        description="Whether tuples count by how sure their order is, 2 P(win) - 1, and not all alike as in the paper.",
    )
    robust_step: float = Field(
        0.0,
        ge=0,
        description="Step of the exponentiated gradient by which worse-off groups gain weight; 0 is the paper's loss.",
    )
    lora_rank: int = Field(16, ge=1, description="Rank of LoRA's updates.")
    lora_alpha: int = Field(32, ge=1, description="Scale of LoRA's updates, over the rank.")
    n_epochs: float = Field(3.0, gt=0, description="Passes over the tuples; the paper's are 3.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak of the cosine schedule; none: the preset's, 2e-3 for `tiny`, 2e-4 for `smol` and for `llava` "
        "the paper's 2e-5.",
    )
    warmup_share: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    max_gradient: float = Field(1.0, gt=0, description="Norm to which a step's gradient is cut.")
    batch_tuples: int = Field(8, ge=1, description="Tuples of one step on one device; each is two rows.")
    n_accumulated: int = Field(1, ge=1, description="Batches whose gradients make one step, on each device.")
    activation_checkpointing: bool = Field(
        False, description="Whether activations are computed again for the gradient: slower, for models of billions."
    )
    held_out_share: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="Share of the products whose tuples are not learnt from but measured on, by the same hash of the "
        "id as the pairs' (`offline.held_out_share`).",
    )
    checkpoint_steps: int = Field(50, ge=1, description="Steps between checkpoints, from which a killed run goes on.")
    log_steps: int = Field(5, ge=1, description="Steps between lines of progress.")

    def of_preset(self, preset: Preset) -> GroupDpoSettings:
        """Return these settings with a preset's learning rate, if none is set."""
        if self.learning_rate is not None:
            return self
        return self.model_copy(update={"learning_rate": DPO_LEARNING_RATES[preset]})


class ChainSettings(BaseModel):
    """When models are trained from the newest dataset, and what a newly trained one must pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(True, description="Whether a run goes on from rows and pairs to models, or ends with them.")
    min_new_impressions: int = Field(
        100_000,
        ge=0,
        description="Impressions counted since the last trained dataset below which none is trained from.",
    )
    max_base_age_s: float = Field(
        7 * 86_400.0,
        gt=0,
        description="Age at which the pre-trained G-MLLM is made anew, s: groups' features move as the stream goes on.",
    )
    max_failures: int = Field(
        3, ge=1, description="Failures after which a run is given up, and the next one begins with the newest dataset."
    )
    seed: int = Field(0, ge=0, description="Seed of weights, draws and orders of all steps.")
    torch_threads: int = Field(2, ge=1, description="Threads of torch; more than there are cores is far slower.")
    keep_versions: int = Field(3, ge=1, description="Models and tuples kept of each kind, besides those of champions.")


class GroupGateSettings(BaseModel):
    """How a new policy's creatives are compared with those of the policy in use, group by group."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_groups: int = Field(24, ge=1, description="Groups, at most, of held-out products that are compared.")
    n_prompts: int = Field(8, ge=2, description="Prompts that either policy writes for a group.")
    max_loss: float = Field(
        0.1,
        ge=0,
        description="Log-odds of being clicked that a group's creatives may lose, on average, by the new reward model.",
    )
    p_false_alarm: float = Field(
        0.05, gt=0, lt=0.5, description="Chance that any group is found worse where none is, over all groups together."
    )


class TrackingSettings(BaseModel):
    """Where runs, metrics and the places of models are kept: MLflow."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = Field(True, description="Whether runs are written to MLflow.")
    url: str | None = Field(
        None,
        description="MLflow's tracking server, such as http://mlflow:5000; none: a SQLite file, `mlflow.db`, in "
        "`offline.dataset_dir`.",
    )
    experiment: str = Field("osmf", min_length=1, description="MLflow's name of the experiment.")
    timeout_s: int = Field(10, ge=1, description="Longest wait for an answer of the server, s.")


class OfflineSettings(BaseModel):
    """The scheduled chain: from a snapshot of the state to GAIP rows and pairs, and on to aligned models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset_dir: Path = Field(
        Path("out/offline"), description="Folder of all artifacts, of the schedule and of the run log."
    )
    interval_s: float = Field(300.0, gt=0, description="Time from one start of a run to the next, s.")
    run_at_start: bool = Field(
        True, description="Whether a new schedule's first run is at once and not after an interval."
    )
    min_new_impressions: int = Field(
        5_000, ge=0, description="Impressions counted since the last dataset below which none is built."
    )
    chain: ChainSettings = Field(ChainSettings(), description="When models are trained.")
    tracking: TrackingSettings = Field(TrackingSettings(), description="Where runs are kept for people: MLflow.")
    counts: Literal["live", "lifetime"] = Field(
        "live",
        description="Counts that CTRs are made of: `live` ones decay and follow a change of tastes, "
        "`lifetime` ones never forget.",
    )
    min_product_impressions: float = Field(
        400.0, ge=0, description="Exposure filter: impressions below which a product gives no rows (section 4.1)."
    )
    min_cell_impressions: float = Field(
        20.0, ge=0, description="Impressions of a creative in a group below which the two give no row."
    )
    min_pair_probability: float = Field(
        0.8, ge=0.5, lt=1, description="Pairs whose P(CTR of the winner > CTR of the loser) is lower are dropped."
    )
    held_out_share: float = Field(
        0.25, ge=0, lt=1, description="Share of the products, or of the creatives, whose pairs are not learnt from."
    )
    held_out_by: Literal["product", "creative"] = Field(
        "creative",
        description="What is held out as a whole: `creative`: new creatives of known products are judged, as in use, "
        "and pairs of a held-out creative and one that is not serve neither purpose; `product`: new products are "
        "judged, which a reward model learns from many products alone.",
    )
    engine: Literal["duckdb", "spark"] = Field(
        "duckdb", description="Where rows and pairs are made: in this process, or by Spark (pyspark and Java needed)."
    )
    spark_master: str = Field("local[*]", description="Spark's master, such as `local[2]` or `spark://host:7077`.")
    spark_partitions: int = Field(
        8, ge=1, description="Parts that Spark works on at once; two to three for each of its cores do well."
    )
    pretrain: PretrainSettings = Field(PretrainSettings(), description="Pre-training of the G-MLLM.")
    reward: RewardSettings = Field(RewardSettings(), description="How reward models are trained.")
    judge: EndpointSettings = Field(
        EndpointSettings(), description="A general vision model that reward models are compared with (Figure 3)."
    )
    tuples: TupleSettings = Field(TupleSettings(), description="Preference tuples.")
    group_dpo: GroupDpoSettings = Field(GroupDpoSettings(), description="Alignment of the G-MLLM with groups.")
    prompt_gate: PromptGateSettings = Field(PromptGateSettings(), description="What an aligned G-MLLM must write.")
    group_gate: GroupGateSettings = Field(GroupGateSettings(), description="What groups must not lose.")
    keep_versions: int = Field(
        20, ge=1, description="Datasets kept; older ones are removed after a new one is complete."
    )
