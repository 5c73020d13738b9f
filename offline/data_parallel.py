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
        Whether each has a GPU, else they are on the CPU; by default where there is any.

    Attributes
    ----------
    n
        How many there are.
    rank
        Which of them this is, from 0 on.
    device
        Where this one's model is.
    """

    def __init__(self, *, on_gpu: bool | None = None) -> None:
        state = PartialState(cpu=not (torch.cuda.is_available() if on_gpu is None else on_gpu))
        self.n = int(state.num_processes)
        self.rank = int(state.process_index)
        self.device = str(state.device)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether accelerate was told to spread a model's weights over them."""
        return os.environ.get("ACCELERATE_USE_FSDP") == "true"

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
