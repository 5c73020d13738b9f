"""The champion's models, loaded, and exchanged as a whole when another champion is named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from generator.champion import Champion, ChampionPointer, ChampionUnreadable
from generator.creative_scorer import CreativeScorer, GrmScorer
from generator.prior import correlation
from generator.prompt_writer import PromptWriter
from generator.settings import MllmSettings
from state.artifact import Artifact, ArtifactError, ArtifactNameError, ArtifactStore

log = logging.getLogger(__name__)


class ChampionUnusable(RuntimeError):
    """A champion whose models cannot be loaded."""

    def __init__(self, champion: Champion, why: object) -> None:
        super().__init__(
            f"the champion {champion.mllm} with {champion.grm} cannot be used: {why}. Restore its artifacts, or "
            "`osmf offline rollback` to the champion before."
        )


@dataclass(frozen=True, eq=False)
class ChampionModels:
    """A champion's models: who writes prompts, who ranks pictures, and how far the latter is to be believed.

    ``r`` is the correlation of the scorer's scores with log-CTRs, at least (`generator.prior.correlation`), and
    ``feature_shape`` that of the group features that both read.
    """

    champion: Champion
    writer: PromptWriter
    scorer: CreativeScorer
    r: float
    feature_shape: tuple[int, int]


Loader = Callable[[Champion], ChampionModels]
"""Loads a champion's models, or raises `ChampionUnusable`."""


class ChampionWatch:
    """Gives the models that are in use, and looks whether others are.

    The pointer is read again when its file has changed. A champion that cannot be read or loaded is reported, once, and
    the one before stays.

    Parameters
    ----------
    pointer
        Says which models are in use.
    load
        Loads them.
    """

    def __init__(self, pointer: ChampionPointer, load: Loader) -> None:
        self._pointer = pointer
        self._load = load
        self._seen: tuple[int, int, int] | None = None
        self._models: ChampionModels | None = None

    def current(self) -> ChampionModels | None:
        """Return the models in use; None before the first champion. Call it between two pieces of work."""
        mark = _mark(self._pointer.path)
        if mark == self._seen:
            return self._models
        self._seen = mark
        try:
            champion = self._pointer.read()
            if champion is None:
                self._models = None
            elif self._models is None or champion != self._models.champion:
                self._models = self._load(champion)
                log.info(
                    "%s writes prompts now, %s ranks pictures (accuracy %.3f on %d pairs)",
                    *(champion.mllm, champion.grm, champion.grm_accuracy, champion.n_grm_pairs),
                )
        except (ChampionUnreadable, ChampionUnusable) as error:
            stays = "the grammar writes prompts" if self._models is None else f"{self._models.champion.mllm} stays"
            log.error("%s Until then %s.", error, stays)
        return self._models


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def load_models(models_dir: Path, settings: MllmSettings, champion: Champion) -> ChampionModels:
    """Load a champion's models from their artifacts, after their files were checked.

    Raises
    ------
    ChampionUnusable
        An artifact is not there, damaged, or no model.
    """
    import torch

    from generator.grm import Grm
    from generator.mllm import GroupMllm

    store = ArtifactStore(models_dir)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    try:
        mllm, grm = (_whole(store, champion, name) for name in (champion.mllm, champion.grm))
        writer = GroupMllm.load(mllm.path, dtype=dtype, device=device)
        judge = Grm.load(grm.path, dtype=dtype, device=device)
    except (ArtifactError, ArtifactNameError, OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ChampionUnusable):
            raise
        raise ChampionUnusable(champion, error) from error
    return ChampionModels(
        champion,
        PromptWriter(writer, champion.mllm, settings),
        GrmScorer(judge, champion.grm),
        correlation(champion.grm_accuracy, champion.n_grm_pairs),
        (writer.model.config.group_n_points, writer.model.config.group_width),
    )


def _whole(store: ArtifactStore, champion: Champion, name: str) -> Artifact:
    found = store.named(name)
    if found is None:
        raise ChampionUnusable(champion, f"{store.root / name} is not there")
    found.verify()
    return found
