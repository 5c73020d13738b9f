"""Preference tuples (s, G, y_w, y_l): prompts of the G-MLLM, drawn, and ranked by a scorer (section 3.3)."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from generator.comparison import Floats
from generator.composition import EmptyCutout
from generator.creative_scorer import Audience, Candidate, CreativeScorer, scores_of
from generator.instructions import INSTRUCTIONS, Task
from generator.mllm import GroupMllm
from generator.prompt import Prompt, is_well_formed
from generator.renderer import Renderer
from generator.settings import MllmSettings
from generator.storage import ImageUnreadable, open_image
from offline.pretrain import Pictures, prompt_input
from offline.pretrain_source import ProductSource
from offline.settings import TupleSettings
from state.artifact import Artifact, ArtifactStore
from state.records import N_FEATURE_POINTS

log = logging.getLogger(__name__)

KIND: Final = "tuples"
TUPLES_FILE: Final = "tuples.parquet"


@dataclass(frozen=True, eq=False, slots=True)
class PreferenceTuple:
    """(s, G, y_w, y_l): for a group of a product, a prompt that does better than another one.

    ``wording`` is the number of the instruction that asked for both, ``group_feature`` is (11, 128) as it was
    then, ``p_win`` the probability that the winner is clicked more.
    """

    product_id: str
    group_id: int
    title: str
    picture_uri: str | None
    wording: int
    group_feature: npt.NDArray[np.float32]
    chosen: str
    rejected: str
    p_win: float


class _Verdict(msgspec.Struct, frozen=True):
    """A tuple as the work file has it: what is not known from the product's source."""

    group_id: int
    wording: int
    chosen: str
    rejected: str
    p_win: float


class _ProductVerdicts(msgspec.Struct, frozen=True):
    """A line of the work file: a product that is done, with how many of its prompts were well formed."""

    product_id: str
    n_prompts: int
    n_well_formed: int
    verdicts: list[_Verdict]


class _Header(msgspec.Struct, frozen=True):
    """The first line of the work file: what the rest was made from, and how."""

    made_from: dict[str, Any]
    settings: dict[str, Any]
    generation: dict[str, Any]
    seed: int


def build_tuples(
    store: ArtifactStore,
    mllm: GroupMllm,
    sources: Sequence[ProductSource],
    renderer: Renderer,
    scorer: CreativeScorer,
    settings: TupleSettings,
    generation: MllmSettings,
    *,
    made_from: dict[str, Any],
    work_file: Path,
    seed: int,
    created_at_ms: int,
    on_product: Callable[[int, int], None] | None = None,
) -> Artifact:
    """Make tuples for every group of every product, and write them as the next version of the artifact ``tuples``.

    A run that was killed goes on after the last product it finished, if nothing that it depends on is another.

    Parameters
    ----------
    store
        Where the artifact goes.
    mllm, renderer, scorer
        What writes, draws and ranks.
    sources
        The products.
    settings, generation
        How many candidates there are, and how they are drawn from the model.
    made_from
        Names of the model's and the snapshot's artifacts.
    work_file
        Where finished products are kept until the artifact is whole.
    seed
        Seed of prompts and pictures.
    created_at_ms
        Time of the artifact.
    on_product
        Is told after each product how many of how many are done.
    """
    origin = {**made_from, "scorer": scorer.name, "renderer": f"{renderer.name}/{renderer.version}"}
    header = _Header(origin, settings.model_dump(mode="json"), generation.model_dump(mode="json"), seed)
    done = _read_work(work_file, header)
    if done:
        log.info("tuples of %d products are there already", len(done))
    pictures = Pictures.of(mllm)
    with work_file.open("ab") as file:
        for number, product in enumerate(sources, start=1):
            if product.product_id in done:
                continue
            verdicts = _judge_product(mllm, product, renderer, scorer, settings, generation, pictures, seed)
            done[product.product_id] = verdicts
            file.write(msgspec.json.encode(verdicts) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            log.info("product %d of %d: %d tuples", number, len(sources), len(verdicts.verdicts))
            if on_product is not None:
                on_product(number, len(sources))
    found = [row for product in sources for row in _tuples(product, done[product.product_id])]
    with store.write(KIND, created_at_ms=created_at_ms) as draft:
        write_tuples(found, draft.file(TUPLES_FILE))
        draft.made_from = {**origin, "seed": seed}
        draft.figures = {
            "n_tuples": len(found),
            "n_products": len(sources),
            "n_groups": len({(row.product_id, row.group_id) for row in found}),
            "n_prompts": sum(of_product.n_prompts for of_product in done.values()),
            "n_well_formed": sum(of_product.n_well_formed for of_product in done.values()),
            "mean_p_win": float(np.mean([row.p_win for row in found])) if found else 0.0,
        }
    work_file.unlink()
    assert draft.finished is not None
    return draft.finished


def write_tuples(tuples: Sequence[PreferenceTuple], path: Path) -> None:
    """Write tuples into a file; `read_tuples` gives the same ones back."""
    pq.write_table(_to_table(tuples), path)


def read_tuples(artifact: Artifact) -> list[PreferenceTuple]:
    """Return the tuples of an artifact."""
    rows = pq.read_table(artifact.file(TUPLES_FILE)).to_pylist()
    return [
        PreferenceTuple(
            **{
                **row,
                "group_feature": np.asarray(row["group_feature"], np.float32).reshape(N_FEATURE_POINTS, -1),
            }
        )
        for row in rows
    ]


def rank_pairs(scores: Floats, *, n_pairs: int, min_win_probability: float) -> Iterator[tuple[int, int, float]]:
    """Give winner, loser and P(win) by log-odds (n,): the best against the worst, and so on inwards."""
    order = np.argsort(-scores, kind="stable")
    for rank in range(min(n_pairs, len(order) // 2)):
        winner, loser = int(order[rank]), int(order[-1 - rank])
        p_win = float(1 / (1 + np.exp(scores[loser] - scores[winner])))
        if p_win >= min_win_probability and scores[winner] > scores[loser]:
            yield winner, loser, p_win


def _judge_product(
    mllm: GroupMllm,
    product: ProductSource,
    renderer: Renderer,
    scorer: CreativeScorer,
    settings: TupleSettings,
    generation: MllmSettings,
    pictures: Pictures,
    seed: int,
) -> _ProductVerdicts:
    nothing = _ProductVerdicts(product.product_id, 0, 0, [])
    if product.picture_uri is None:
        log.warning("product %r has no picture: no tuples", product.product_id)
        return nothing
    try:
        cutout = open_image(product.picture_uri)
    except ImageUnreadable as error:
        log.warning("product %r: %s: no tuples", product.product_id, error)
        return nothing
    # By product, so that a run that goes on draws what it would have.
    drawn_by = _seed_of(seed, product.product_id)
    wordings = np.random.default_rng(drawn_by).integers(
        len(INSTRUCTIONS[Task.PROMPT_GENERATION]), size=len(product.groups)
    )
    answers = mllm.generate(
        [
            prompt_input(product, group.feature, pictures, wording=int(wording))
            for group, wording in zip(product.groups, wordings, strict=True)
        ],
        max_new_tokens=generation.max_new_tokens,
        n_samples=settings.n_candidates,
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=drawn_by,
        batch_size=settings.batch_rows,
    )
    # What was written for one group is a candidate of all: where one's winner is another's loser, the group decides.
    fine = [[text for text in texts if is_well_formed(text)] for texts in answers]
    candidates = []
    try:
        for text in dict.fromkeys(text for of_group in fine for text in of_group):
            drawn = Prompt.parse(text).named(product.title).text
            # One seed for all: pictures differ by their prompts alone.
            image = renderer.render(cutout, drawn, seed=drawn_by, size_px=settings.size_px).image
            candidates.append(Candidate(text, image))
    except EmptyCutout as error:
        log.warning("product %r: %s: no tuples", product.product_id, error)
        return nothing
    n_prompts, n_well_formed = (sum(len(texts) for texts in of_groups) for of_groups in (answers, fine))
    if len(candidates) < 2:
        return _ProductVerdicts(product.product_id, n_prompts, n_well_formed, [])
    verdicts: list[_Verdict] = []
    for group, wording in zip(product.groups, wordings, strict=True):
        audience = Audience(product.product_id, product.title, group.group_id, group.feature)
        scores = scores_of(scorer, audience, candidates)
        for winner, loser, p_win in rank_pairs(
            scores, n_pairs=settings.n_pairs, min_win_probability=settings.min_win_probability
        ):
            chosen, rejected = candidates[winner].prompt, candidates[loser].prompt
            verdicts.append(_Verdict(group.group_id, int(wording), chosen, rejected, p_win))
    return _ProductVerdicts(product.product_id, n_prompts, n_well_formed, verdicts)


def _tuples(product: ProductSource, judged: _ProductVerdicts) -> Iterator[PreferenceTuple]:
    features = {group.group_id: group.feature for group in product.groups}
    for verdict in judged.verdicts:
        yield PreferenceTuple(
            product.product_id,
            verdict.group_id,
            product.title,
            product.picture_uri,
            verdict.wording,
            features[verdict.group_id],
            verdict.chosen,
            verdict.rejected,
            verdict.p_win,
        )


def _read_work(path: Path, header: _Header) -> dict[str, _ProductVerdicts]:
    """Return the products that are done; a file of another run, or none, becomes a new one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]  # what was killed while it wrote left half a line
    first = msgspec.json.encode(header) + b"\n"
    if whole[:1] != [first]:
        whole = [first]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(whole))
    found = [msgspec.json.decode(line, type=_ProductVerdicts) for line in whole[1:]]
    return {of_product.product_id: of_product for of_product in found}


def _to_table(tuples: Sequence[PreferenceTuple]) -> pa.Table:
    schema = pa.schema(
        [
            ("product_id", pa.string()),
            ("group_id", pa.int64()),
            ("title", pa.string()),
            ("picture_uri", pa.string()),
            ("wording", pa.int64()),
            ("group_feature", pa.list_(pa.float32())),
            ("chosen", pa.string()),
            ("rejected", pa.string()),
            ("p_win", pa.float64()),
        ]
    )
    rows = [
        {
            "product_id": row.product_id,
            "group_id": row.group_id,
            "title": row.title,
            "picture_uri": row.picture_uri,
            "wording": row.wording,
            "group_feature": row.group_feature.reshape(-1),
            "chosen": row.chosen,
            "rejected": row.rejected,
            "p_win": row.p_win,
        }
        for row in tuples
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def _seed_of(seed: int, product_id: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{product_id}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") >> 1
