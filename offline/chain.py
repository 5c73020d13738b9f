"""The chain of offline jobs: rebuild, pre-train, GRM, tuples, Group-DPO, gate, promote; one run at a time.

A run that was killed is found unfinished by the next one, which goes on with it: finished steps are known by their
artifacts, unfinished ones go on from their work folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import msgspec

from generator.champion import ChampionPointer
from generator.settings import GeneratorSettings
from offline.chain_state import ChainState, TrainedFrom, UnfinishedRun
from offline.rebuild import KIND as DATASET_KIND
from offline.rebuild import Clock, n_impressions_of, rebuild
from offline.run_lock import RunUnderWay, run_lock
from offline.runs import RUN_LOG, Outcome, RunLog, RunRecord, Step
from offline.settings import OfflineSettings
from offline.watcher import LogWatcher, Watcher
from online.settings import OnlineSettings
from state.artifact import Artifact, ArtifactStore

if TYPE_CHECKING:
    from offline.steps import Workshop

WORK_FOLDER: Final = "work"

T = TypeVar("T")

log = logging.getLogger(__name__)


def wall_clock_ms() -> int:
    """Return the machine's time, ms since the Unix epoch."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class ChainRooms:
    """What the chain works on: the state, and the settings of those who made it and of those who use what comes out."""

    state_path: Path
    online: OnlineSettings
    generator: GeneratorSettings
    offline: OfflineSettings


def run_chain(
    rooms: ChainRooms,
    *,
    all_steps: bool = False,
    clock: Clock = wall_clock_ms,
    watcher: Watcher | None = None,
) -> list[RunRecord]:
    """Run the chain once, or go on with a run that was killed, and record what comes of each step.

    It ends early, with a recorded reason, where too little is new, where there is nothing to learn from, and where the
    gate refuses. A failure is recorded and returned, not raised; the next run goes on with it, until
    ``chain.max_failures``.

    Parameters
    ----------
    rooms
        State and settings.
    all_steps
        Whether every step is taken even when too little is new for it.
    clock
        Gives the times of records and artifacts.
    watcher
        Who is told; by default the log.

    Returns
    -------
    The records of the steps that this call came to, in their order; one at least.

    Raises
    ------
    offline.run_lock.RunUnderWay
        If another process is running it.
    offline.chain_state.ChainStateUnreadable
        If the file that says where the chain is is damaged.
    """
    with run_lock(rooms.offline.dataset_dir):
        return _Run(rooms, all_steps, clock, LogWatcher() if watcher is None else watcher).run()


def run_or_skip(rooms: ChainRooms, *, clock: Clock = wall_clock_ms, watcher: Watcher | None = None) -> list[RunRecord]:
    """Run the chain as `run_chain` does; where another process is running it, record that this run is skipped."""
    started_at_ms = clock()
    try:
        return run_chain(rooms, clock=clock, watcher=watcher)
    except RunUnderWay as error:
        return [record_skipped(rooms.offline, str(error), started_at_ms)]


def record_skipped(settings: OfflineSettings, reason: str, now_ms: int) -> RunRecord:
    """Record a run that could not begin, and return the record."""
    record = RunRecord(
        run_id=_run_id(now_ms), started_at_ms=now_ms, finished_at_ms=now_ms, outcome="skipped", reason=reason
    )
    RunLog(settings.dataset_dir / RUN_LOG).append(record)
    return record


def roll_back(settings: OfflineSettings, *, clock: Clock = wall_clock_ms) -> RunRecord:
    """Use the champion before again, while a run may go on, and record it.

    Raises
    ------
    generator.champion.NoFormerChampion, generator.champion.ChampionUnreadable
        If there is none, or the pointer is damaged.
    """
    started_at_ms = clock()
    pointer = ChampionPointer(settings.dataset_dir)
    before = pointer.read()
    champion = pointer.roll_back()
    assert before is not None
    record = RunRecord(
        run_id=_run_id(started_at_ms),
        step="rollback",
        started_at_ms=started_at_ms,
        finished_at_ms=clock(),
        outcome="rolled-back",
        artifact=champion.mllm,
        reason=f"{champion.mllm} and {champion.grm} are in use again, not {before.mllm} and {before.grm}",
    )
    RunLog(settings.dataset_dir / RUN_LOG).append(record)
    return record


def read_runs(settings: OfflineSettings) -> list[RunRecord]:
    """Return all recorded steps of all runs, oldest first."""
    return RunLog(settings.dataset_dir / RUN_LOG).read()


def _run_id(now_ms: int) -> str:
    return f"run-{now_ms}-{os.getpid()}"


class _Ended(Exception):
    """The run is over: its last record says why."""


class _Failed(Exception):
    """A step has failed: the last record says how."""


@dataclass(slots=True)
class _Run:
    """One call of `run_chain`."""

    rooms: ChainRooms
    all_steps: bool
    clock: Clock
    watcher: Watcher
    run_id: str = ""
    records: list[RunRecord] = field(default_factory=list)
    recorded: set[tuple[Step, str | None]] = field(default_factory=set)
    """What this run had built before it was killed, as far as the log knows it."""

    @property
    def _settings(self) -> OfflineSettings:
        return self.rooms.offline

    @property
    def _folder(self) -> Path:
        return self._settings.dataset_dir

    def run(self) -> list[RunRecord]:
        state = ChainState.read(self._folder)
        dataset = None
        if state.unfinished is not None:
            dataset = ArtifactStore(self._folder).named(state.unfinished.dataset)
            if dataset is None:
                log.warning("the unfinished %s has lost its dataset: a new one begins", state.unfinished.run_id)
                state = msgspec.structs.replace(state, unfinished=None)
        self.run_id = _run_id(self.clock()) if state.unfinished is None else state.unfinished.run_id
        self.watcher.on_run(self.run_id, self._parameters())
        with suppress(_Ended, _Failed):
            self._go(state, dataset)
        self.watcher.on_end()
        return self.records

    def _go(self, state: ChainState, dataset: Artifact | None) -> None:
        if dataset is None or state.unfinished is None:
            dataset = self._dataset(state)
            run = UnfinishedRun(run_id=self.run_id, dataset=dataset.name, all_steps=self.all_steps)
        else:
            log.info("going on with %s", self.run_id)
            log_of_runs = RunLog(self._folder / RUN_LOG).read()
            self.recorded = {(record.step, record.artifact) for record in log_of_runs if record.run_id == self.run_id}
            run = msgspec.structs.replace(state.unfinished, all_steps=state.unfinished.all_steps or self.all_steps)
        self.all_steps = run.all_steps
        state = msgspec.structs.replace(state, unfinished=run)
        state.write(self._folder)
        try:
            with suppress(_Ended):
                self._train(dataset)
        except _Failed:
            run = msgspec.structs.replace(run, n_failures=run.n_failures + 1)
            if run.n_failures < self._settings.chain.max_failures:
                msgspec.structs.replace(state, unfinished=run).write(self._folder)
                raise
            log.error("%s has failed %d times and is given up", self.run_id, run.n_failures)
        trained = TrainedFrom(run_id=self.run_id, dataset=dataset.name, n_impressions=n_impressions_of(dataset))
        ChainState(trained=trained).write(self._folder)
        shutil.rmtree(self._folder / WORK_FOLDER / self.run_id, ignore_errors=True)
        with suppress(OSError):  # somebody else's work is in it, or none was left
            (self._folder / WORK_FOLDER).rmdir()
        self._prune()

    def _dataset(self, state: ChainState) -> Artifact:
        """Return the dataset to train from: a new one, or the newest where too little has come since."""
        settings, started_at_ms = self._settings, self.clock()
        self.watcher.on_step("rebuild")
        try:
            rebuilt = rebuild(
                settings, self.rooms.online, self.rooms.state_path, clock=self.clock, whatever_is_new=self.all_steps
            )
        except Exception as error:
            self._fail("rebuild", started_at_ms, error)
        figures: dict[str, float] = {}
        if rebuilt.n_new_impressions is not None:
            figures["n_new_impressions"] = rebuilt.n_new_impressions
        if rebuilt.dataset is not None:
            figures |= rebuilt.dataset.manifest.figures
        self._record(
            "rebuild",
            started_at_ms,
            "skipped" if rebuilt.dataset is None else "built",
            reason=rebuilt.reason,
            artifact=rebuilt.dataset,
            figures=figures,
            snapshot_id=rebuilt.snapshot_id,
        )
        dataset = rebuilt.dataset or ArtifactStore(self._folder).latest(DATASET_KIND)
        if dataset is None or not settings.chain.enabled:
            raise _Ended
        n_new = n_impressions_of(dataset) - (0 if state.trained is None else state.trained.n_impressions)
        if n_new < settings.chain.min_new_impressions and not self.all_steps:
            since = "so far" if state.trained is None else f"since {state.trained.dataset} was trained from"
            self._end(
                "pretrain",
                self.clock(),
                "skipped",
                f"{n_new} new impressions {since}, chain.min_new_impressions is {settings.chain.min_new_impressions}",
            )
        return dataset

    def _train(self, dataset: Artifact) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from offline import steps
        from offline.grm_training import NoPairsError
        from offline.group_dpo import NoTuplesError
        from offline.pretrain_rows import NothingToLearnFrom

        torch.set_num_threads(self._settings.chain.torch_threads)
        disable_progress_bar()  # the watcher shows progress
        shop = steps.Workshop(
            self._settings,
            self.rooms.generator,
            self._folder / WORK_FOLDER / self.run_id,
            self.clock,
            self.watcher.on_progress,
        )
        base = self._kept_base(shop)
        if base is None:
            base = self._build("pretrain", lambda: steps.pretrain_step(shop, dataset), nothing=NothingToLearnFrom)
        grm = self._build("grm", lambda: steps.grm_step(shop, dataset, base), nothing=NoPairsError)
        tuples = self._build("tuples", lambda: steps.tuples_step(shop, dataset, base, grm))
        mllm = self._build("group-dpo", lambda: steps.group_dpo_step(shop, tuples, base), nothing=NoTuplesError)
        started_at_ms = self.clock()
        champion = ChampionPointer(self._folder)
        verdict = self._take("gate", lambda: steps.gate_step(shop, dataset, mllm, grm, champion.read() or base))
        if verdict.refusals:
            self._end("gate", started_at_ms, "refused", "; ".join(verdict.refusals), figures=verdict.figures)
        self._record("gate", started_at_ms, "passed", figures=verdict.figures)
        started_at_ms = self.clock()
        promoted = self._take("promote", lambda: steps.promote_step(shop, mllm, grm, verdict.figures))
        self._record("promote", started_at_ms, "promoted", reason=promoted.reason, artifact=mllm)

    def _kept_base(self, shop: Workshop) -> Artifact | None:
        """Return the pre-trained G-MLLM that is still good for a run; None where one has to be made."""
        from offline.steps import BASE_KIND, base_settings, find_artifact

        if self.all_steps:
            return None
        found = find_artifact(shop.artifacts, BASE_KIND, base_settings(shop))
        if found is None:
            return None
        age_s = (self.clock() - found.manifest.created_at_ms) / 1000
        if age_s > self._settings.chain.max_base_age_s:
            return None
        return found

    def _build(self, step: Step, make: Callable[[], Artifact], *, nothing: type[Exception] | None = None) -> Artifact:
        """Take a step that makes an artifact; end the run where there is ``nothing`` to make it from."""
        started_at_ms = self.clock()
        made = self._take(step, make, nothing=nothing)
        if (step, made.name) in self.recorded:
            log.info("%s: %s is there already", step, made.name)
        else:
            self._record(step, started_at_ms, "built", artifact=made, figures=made.manifest.figures)
        return made

    def _take(self, step: Step, do: Callable[[], T], *, nothing: type[Exception] | None = None) -> T:
        started_at_ms = self.clock()
        self.watcher.on_step(step)
        try:
            return do()
        except Exception as error:
            if nothing is not None and isinstance(error, nothing):
                self._end(step, started_at_ms, "skipped", str(error))
            self._fail(step, started_at_ms, error)

    def _fail(self, step: Step, started_at_ms: int, error: Exception) -> NoReturn:
        log.error("%s: %s failed", self.run_id, step, exc_info=error)
        self._record(step, started_at_ms, "failed", reason=f"{type(error).__name__}: {error}")
        raise _Failed from error

    def _end(
        self,
        step: Step,
        started_at_ms: int,
        outcome: Outcome,
        reason: str,
        *,
        figures: Mapping[str, float] | None = None,
    ) -> NoReturn:
        self._record(step, started_at_ms, outcome, reason=reason, figures=figures or {})
        raise _Ended

    def _record(
        self,
        step: Step,
        started_at_ms: int,
        outcome: Outcome,
        *,
        reason: str | None = None,
        artifact: Artifact | None = None,
        figures: Mapping[str, float] | None = None,
        snapshot_id: str | None = None,
    ) -> None:
        record = RunRecord(
            run_id=self.run_id,
            step=step,
            started_at_ms=started_at_ms,
            finished_at_ms=self.clock(),
            outcome=outcome,
            reason=reason,
            artifact=None if artifact is None else artifact.name,
            snapshot_id=snapshot_id,
            figures=dict(figures or {}),
        )
        RunLog(self._folder / RUN_LOG).append(record)
        self.records.append(record)
        self.watcher.on_record(record)

    def _prune(self) -> None:
        """Remove old models and tuples, but for those of champions and what they were made from."""
        from offline.steps import MODEL_KINDS

        artifacts = ArtifactStore(self._folder)
        in_use: set[str] = set()
        for champion in ChampionPointer(self._folder).champions():
            in_use |= {champion.mllm, champion.grm}
        for kind in MODEL_KINDS:
            artifacts.prune(kind, self._settings.chain.keep_versions, in_use=in_use)

    def _parameters(self) -> dict[str, Any]:
        """Return the settings that decide what comes out."""
        trained = {"pretrain", "reward", "tuples", "group_dpo", "prompt_gate", "group_gate", "chain"}
        return {
            "mllm": self.rooms.generator.mllm.model_dump(mode="json"),
            **self._settings.model_dump(mode="json", include=trained),
        }
