"""`osmf creative`: a file's label is shown and verified, and what waits can be accepted while the generator runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from generator.certificate import load_identity
from generator.jumbf import without_manifest
from generator.manifest import ManifestSigner
from generator.review import ReviewRecord
from generator.settings import CheckSettings, GeneratorSettings, SigningSettings
from generator.storage import ImageStore, MetadataValue, local_path
from osmf.cli import app
from osmf.settings import Settings, settings_variables
from state.records import encode_record
from state.settings import StateSettings
from state.store import ChangeSet, Store, Table
from streams.broker import LocalBroker
from streams.events import Creative, CreativeRequested
from streams.producer import EventProducer
from streams.settings import StreamSettings
from streams.tail import Tail
from tests.generator.stored import put

NOW_MS = time.time_ns() // 1_000_000
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeSynthetic"
METADATA: dict[str, MetadataValue] = {
    "creative_id": "gen-1",
    "product_id": "p-18",
    "group_id": 3,
    "renderer": "procedural",
    "version": "1",
    "prompt": "a prompt",
    "prompt_sha256": "ab" * 32,
    "digital_source_type": SOURCE_TYPE,
}


def signed_creative(folder: Path, signing: SigningSettings) -> Path:
    identity = load_identity(signing, now_ms=NOW_MS)
    store = ImageStore(str(folder), signer=None if identity is None else ManifestSigner(identity))
    image = Image.linear_gradient("L").resize((96, 96)).convert("RGB")
    path = local_path(put(store, image, METADATA).uri)
    assert path is not None
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_creatives_label_is_shown_whole(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = signed_creative(here / "creatives", SigningSettings())
    result = CliRunner().invoke(app, ["creative", "show", str(path)])
    assert result.exit_code == 0, result.output
    for said in ("compositeSynthetic", "p-18", "procedural", "ab" * 32, "trusted", "OSMF development", "c2pa.created"):
        assert said in result.output.replace("\n", ""), said
    figures = json.loads(CliRunner().invoke(app, ["creative", "show", str(path), "--json", "-"]).stdout)
    assert figures["metrics"] == {"is_genuine": 1}
    assert figures["detail"]["record"] == figures["detail"]["manifest"]["record"] == METADATA
    assert figures["detail"]["digital_source_type"] == SOURCE_TYPE


def _flip(path: Path, at: int) -> Path:
    payload = bytearray(path.read_bytes())
    payload[at] ^= 1
    path.write_bytes(payload)
    return path


def _renamed(path: Path) -> Path:
    """Return a changed file under a name that promises nothing: only the manifest can tell."""
    return _flip(path, -10).rename(path.with_name("picture.jpg"))


def _stripped(path: Path) -> Path:
    path.write_bytes(without_manifest(path.read_bytes()))
    return path


def _plain(path: Path) -> Path:
    Image.new("RGB", (9, 9)).save(path.with_name("plain.jpg"))
    return path.with_name("plain.jpg")


def _of_others(path: Path) -> Path:
    return signed_creative(path.parent / "others", SigningSettings(folder=path.parent / "their-signing"))


def _text(path: Path) -> Path:
    path.with_name("text.jpg").write_text("no picture")
    return path.with_name("text.jpg")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: _flip(path, -10), "its name says"),
        (lambda path: _flip(path, -10), "is not what was signed"),
        (_renamed, "is not what was signed"),
        (_stripped, "no C2PA manifest"),
        (_plain, "does not say how it was made"),
        (_of_others, "whom neither our certificate nor"),
        (_text, "cannot be read as a picture"),
        (lambda path: path.with_name("none.jpg"), "No such file"),
    ],
)
def test_a_file_that_is_not_as_it_was_published_is_reported(
    here: Path, harm: Callable[[Path], Path], said: str
) -> None:
    path = harm(signed_creative(here / "creatives", SigningSettings()))
    result = CliRunner().invoke(app, ["creative", "show", str(path)])
    assert result.exit_code == 1
    assert said in result.output


def test_where_nothing_is_signed_a_missing_manifest_is_no_problem(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSMF_GENERATOR__SIGNING__MODE", "off")
    path = signed_creative(here / "creatives", SigningSettings(mode="off"))
    result = CliRunner().invoke(app, ["creative", "show", str(path)])
    assert result.exit_code == 0, result.output


def write_reviews(folder: Path) -> None:
    changes = ChangeSet()
    for number, (status, reason, by) in enumerate(
        [("waiting", "", None), ("refused", "safe: unsafe with 0.9", None), ("rejected", "too dark", "ann")]
    ):
        review = ReviewRecord(
            f"gen-{number}", "p-18", 2, "shift-1", 50_000, "a prompt", 0.02, "file:///x.jpg", status, reason, by
        )
        changes.put(Table.REVIEWS, str(number).encode(), encode_record(review))
    with Store(folder, map_size_mib=16) as store:
        store.commit(changes)


@pytest.mark.parametrize(
    ("arguments", "creative_id", "said"),
    [
        (["queue"], "gen-0", "a prompt"),
        (["refused"], "gen-1", "safe: unsafe with 0.9"),
        (["refused", "--by-people"], "gen-2", "too dark (ann)"),
    ],
)
def test_what_waits_and_what_was_refused_is_listed(
    here: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], creative_id: str, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "`osmf generator` has not run" in CliRunner().invoke(app, ["creative", *arguments]).output
    write_reviews(here / "out/generator-state")
    result = CliRunner().invoke(app, ["creative", *arguments])
    assert result.exit_code == 0, result.output
    assert creative_id in result.output
    assert said in result.output
    figures = json.loads(CliRunner().invoke(app, ["creative", *arguments, "--json", "-"]).stdout)
    (found,) = figures["detail"]["creatives"]
    assert (found["creative_id"], found["product_id"], found["image_uri"]) == (creative_id, "p-18", "file:///x.jpg")


@pytest.mark.parametrize("creative_id", ["gen-1", "gen-2", "gen-none"])
def test_only_what_waits_can_be_accepted(here: Path, creative_id: str) -> None:
    write_reviews(here / "out/generator-state")
    result = CliRunner().invoke(app, ["creative", "accept", creative_id])
    assert result.exit_code == 1
    assert "Nothing was decided" in result.output


@pytest.mark.broker
def test_a_creative_is_accepted_while_the_generator_runs(tmp_path: Path) -> None:
    from generator.process import run_generator
    from online.encoders import HashedImageEncoder
    from tests.generator.bench import picture, shift, write_online_state

    generator = GeneratorSettings(
        size_px=96,
        approval="manual",
        storage_url=str(tmp_path / "creatives"),
        review_url=str(tmp_path / "review"),
        state_path=tmp_path / "own",
        signing=SigningSettings(folder=tmp_path / "signing"),
        checks=CheckSettings(unsafe=False, portraits=False),
    )
    state = StateSettings(path=tmp_path / "state", map_size_mib=16)
    write_online_state(state.path, picture(tmp_path / "cutout.png"))
    names = StreamSettings().topics.model_dump().values()
    with LocalBroker(dict.fromkeys(names, 1), log_path=tmp_path / "broker.log") as broker:
        streams = StreamSettings(bootstrap_servers=broker.bootstrap_servers, linger_ms=20)
        variables = settings_variables(Settings(streams=streams, state=state, generator=generator))

        def osmf(*arguments: str) -> str:
            command = [sys.executable, "-m", "osmf", "creative", *arguments]
            return subprocess.run(
                command, env={**_environment(), **variables}, check=True, capture_output=True, text=True
            ).stdout

        stop, emitted = threading.Event(), list[Creative]()
        worker = threading.Thread(
            target=run_generator,
            args=(streams, generator, state, HashedImageEncoder()),
            kwargs={
                "now_ms": NOW_MS,
                "clock_s": time.monotonic,
                "stop": stop.is_set,
                "on_emitted": emitted.append,
            },
        )
        with EventProducer(streams, client_id="test") as producer:
            producer.send(shift())
            producer.flush()
        worker.start()
        try:
            waiting = _until(lambda: _queue(osmf), 2)
            assert not emitted
            osmf("reject", waiting[0], "--reason", "too dark", "--by", "ann")
            osmf("accept", waiting[1])
            _until(lambda: [creative.creative_id for creative in emitted], 1)
            assert _queue(osmf) == []
            (rejected,) = json.loads(osmf("refused", "--by-people", "--json", "-"))["detail"]["creatives"]
        finally:
            stop.set()
            worker.join(20)
        assert [creative.creative_id for creative in emitted] == [waiting[1]]
        assert (rejected["creative_id"], rejected["reason"], rejected["reviewed_by"]) == (waiting[0], "too dark", "ann")
        with Tail(streams, streams.topics.creatives, Creative) as tail:
            published = _until(lambda: tail.poll(500), 1)
        assert published == emitted


def _queue(osmf: Callable[..., str]) -> list[str]:
    found = json.loads(osmf("queue", "--json", "-"))["detail"]["creatives"]
    return [creative["creative_id"] for creative in found]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("OSMF_")}


def _until(look: Callable[[], list[Any]], n: int) -> list[Any]:
    deadline_s = time.monotonic() + 30
    while len(found := look()) < n:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.1)
    return found


@pytest.mark.broker
def test_creatives_are_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.generator.bench import write_online_state

    write_online_state(here / "out/state", None)
    monkeypatch.setenv("OSMF_STATE__PATH", str(here / "out/state"))
    refused = [
        (["nobody"], "no product 'nobody' has been registered"),
        (["p-1", "--group", "7"], "product 'p-1' has the groups 0, 1; nothing was asked for"),
    ]
    for arguments, said in refused:
        result = CliRunner().invoke(app, ["creative", "request", *arguments])
        assert result.exit_code == 1
        assert said in result.output
    topics = StreamSettings().topics
    with LocalBroker({topics.creatives_requested: 1}, log_path=here / "broker.log") as broker:
        monkeypatch.setenv("OSMF_STREAMS__BOOTSTRAP_SERVERS", broker.bootstrap_servers)
        arguments = ["p-1", "--group", "1", "--reason", "summer", "--by", "ann"]
        result = CliRunner().invoke(app, ["creative", "request", *arguments])
        assert result.exit_code == 0, result.output
        with Tail(
            StreamSettings(bootstrap_servers=broker.bootstrap_servers), topics.creatives_requested, CreativeRequested
        ) as tail:
            (event,) = tail.poll(3_000)
    assert (event.product_id, event.group_id, event.reason) == ("p-1", 1, "summer")
    assert (event.requested_by, event.cause) == ("ann", "person")
    assert event.event_id in result.output
