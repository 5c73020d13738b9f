"""Data parallel training: processes that hold the same model and take their share of every step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

T = TypeVar("T")


class DataParallel:
    """The processes that train together, as the launcher has started them; without a launcher this one alone.

    Parameters
    ----------
    on_gpu
        Whether each has a GPU; else they are on the CPU.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._state = PartialState(cpu=not on_gpu)

    @property
    def n(self) -> int:
        """How many there are."""
        return int(self._state.num_processes)

    @property
    def rank(self) -> int:
        """Which of them this is, from 0 on."""
        return int(self._state.process_index)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether accelerate was told to spread a model's weights over them."""
        return os.environ.get("ACCELERATE_USE_FSDP") == "true"

    @property
    def device(self) -> str:
        """Where this one's model is."""
        return str(self._state.device)

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """Return this process's part of rows, whose number all processes divide."""
        n = len(rows) // self.n
        return rows[self.rank * n : (self.rank + 1) * n]

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their mean over the processes."""
        if self.n == 1:
            return
        for tensor in tensors:
            distributed.all_reduce(tensor)
            tensor /= self.n

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of the first process."""
        if self.n == 1:
            return
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)

    def wait(self) -> None:
        """Wait until all have come here."""
        self._state.wait_for_everyone()

    def by_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes; the others wait for it."""
        if self.n == 1:
            return make()
        made: list[Any] = [make() if self.is_first else None]
        distributed.broadcast_object_list(made, src=0)
        found: T = made[0]
        return found


def whole_weights(model: torch.nn.Module) -> dict[str, Any]:
    """Return a model's weights on the CPU, put together where they are spread; empty but on the first process then."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
