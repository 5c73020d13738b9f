"""The compose file: it parses, its commands are the command line's, its settings are ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from osmf.cli import app
from osmf.settings import Settings

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
RUNS_OSMF = {name: service for name, service in OURS.items() if "entrypoint" not in service}


def test_there_is_one_service_per_process() -> None:
    assert {"kafka", "online", "generator", "offline", "serve", "simulate"} <= SERVICES.keys()
    assert SERVICES["kafka"]["image"].startswith("apache/kafka:")
    assert SERVICES["simulate"]["profiles"] == ["demo"]
    assert {service["image"] for service in OURS.values()} == {"osmf:0.1.0"}


@pytest.mark.parametrize("name", RUNS_OSMF)
def test_a_services_command_is_one_of_the_command_line(name: str) -> None:
    command, *options = RUNS_OSMF[name]["command"]
    commands = typer.main.get_group(app).commands
    assert command in commands
    found = commands[command]
    if command == "offline":
        found = found.commands[options.pop(0)]
    known = {option for parameter in found.params for option in parameter.opts}
    assert set(options) <= known


@pytest.mark.parametrize("name", RUNS_OSMF)
def test_a_services_variables_are_settings(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [v for v in os.environ if v.startswith("OSMF_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)  # no osmf.toml there
    before = Settings().model_dump(mode="json")
    variables = {k: v for k, v in RUNS_OSMF[name]["environment"].items() if k.startswith("OSMF_")}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    after = Settings().model_dump(mode="json")  # refuses an unknown key
    assert after["streams"]["bootstrap_servers"] == "kafka:9092"
    for variable in variables:
        read_before, read_after = before, after
        for key in variable.removeprefix("OSMF_").lower().split("__"):
            read_before, read_after = read_before[key], read_after[key]
        assert read_after != read_before, f"{variable} repeats the default"


def test_volumes_and_dependencies_are_declared() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"], name
        for other in service.get("depends_on", {}):
            assert other in SERVICES, name


@pytest.mark.parametrize(
    "package", ["streams", "state", "online", "generator", "offline", "serving", "simulator", "osmf"]
)
def test_the_image_gets_every_room(package: str) -> None:
    assert f"COPY {package} {package}\n" in (ROOT / "Dockerfile").read_text()
    assert f"!{package}\n" in (ROOT / ".dockerignore").read_text()
