"""Settings: one file (``osmf.toml``) and ``OSMF_…`` variables for every process.

``OSMF_STREAMS__BOOTSTRAP_SERVERS=kafka:9092`` sets ``bootstrap_servers`` of the section
``[streams]``; variables win over the file. An unknown key or an impossible value is refused.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from generator.settings import GeneratorSettings
from offline.settings import OfflineSettings
from online.settings import OnlineSettings
from serving.settings import ServingSettings
from simulator.settings import SimulatorSettings
from state.settings import StateSettings
from streams.settings import StreamSettings

PREFIX = "OSMF_"
CONFIG_VARIABLE = "OSMF_CONFIG"


class SettingsRefusedError(ValueError):
    """The settings cannot be used: what is wrong, where, and what is allowed."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join([*problems, "Nothing was started. `osmf settings` lists every key."]))
        self.problems = problems


class Settings(BaseSettings):
    """All settings, one section for each room."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, toml_file="osmf.toml"
    )
    config_file: ClassVar[Path | None] = None

    streams: StreamSettings = StreamSettings()
    state: StateSettings = StateSettings()
    online: OnlineSettings = OnlineSettings()
    generator: GeneratorSettings = GeneratorSettings()
    serving: ServingSettings = ServingSettings()
    offline: OfflineSettings = OfflineSettings()
    simulator: SimulatorSettings = SimulatorSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments first, then variables, then the file."""
        path = Path(os.environ.get(CONFIG_VARIABLE, "osmf.toml"))
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)


def load_settings(**sections: Any) -> Settings:
    """Load the settings; ``sections`` win over variables and file.

    Raises
    ------
    SettingsRefusedError
        The file is missing or no TOML, or a key or value of it or of a variable is not allowed.
    """
    config = os.environ.get(CONFIG_VARIABLE)
    if config is not None and not Path(config).is_file():
        raise SettingsRefusedError([f"{CONFIG_VARIABLE}: there is no file {config!r}"])
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    if unknown := [
        name
        for name in sorted(os.environ)
        if name.startswith(PREFIX) and name != CONFIG_VARIABLE and name.split("__")[0].upper() not in known
    ]:
        raise SettingsRefusedError(
            [f"{name}: there is no such section; allowed are {', '.join(sorted(known))}" for name in unknown]
        )
    try:
        return Settings(**sections)
    except ValidationError as error:
        raise SettingsRefusedError([_explain(dict(problem)) for problem in error.errors()]) from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsRefusedError([f"{config or 'osmf.toml'} is no TOML: {error}"]) from error
    except SettingsError as error:
        raise SettingsRefusedError([f"{error}: {error.__cause__}"]) from error


def settings_variables(settings: Settings) -> dict[str, str]:
    """Return variables that give another process exactly these settings: one a section, as JSON."""
    return {PREFIX + name.upper(): getattr(settings, name).model_dump_json() for name in type(settings).model_fields}


def _explain(problem: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return (
            f"{key}: there is no such key (its value was {problem['input']!r}); allowed are {_siblings(problem['loc'])}"
        )
    return f"{key} = {problem['input']!r}: {problem['msg']}"


def _siblings(location: tuple[str | int, ...]) -> str:
    model: Any = Settings
    for part in location[:-1]:
        field = model.model_fields.get(part)
        if field is None or not hasattr(field.annotation, "model_fields"):
            break
        model = field.annotation
    return ", ".join(sorted(model.model_fields))


def describe_settings(model: Any = Settings, section: str = "") -> list[tuple[str, str, str]]:
    """Return (key, default, description) of every setting, by section."""
    rows: list[tuple[str, str, str]] = []
    for name, field in model.model_fields.items():
        key = f"{section}.{name}" if section else name
        if hasattr(field.annotation, "model_fields"):
            rows += describe_settings(field.annotation, key)
        else:
            default = str(field.default)
            rows.append((key, default if len(default) <= 60 else default[:57] + "...", field.description or ""))
    return rows
