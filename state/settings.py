"""Settings of the state: where it lies and how hard it is written."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class StateSettings(BaseModel):
    """Where the LMDB environment lies and how it is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(Path("out/state"), description="Folder of the LMDB environment; one writer at a time.")
    map_size_mib: int = Field(
        1024, ge=16, le=1_048_576, description="First size of the memory map, MiB; it doubles by itself when full."
    )
    sync: bool = Field(
        True,
        description="Whether a commit waits for the disk. Without it a killed process still loses nothing, "
        "but a machine that loses power may lose the last commits.",
    )
