"""Descent: steps of AdamW down a stream of losses, by one process or by several that train together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from offline.data_parallel import DataParallel


def descend(
    parameters: Sequence[nn.Parameter],
    losses: Iterator[Tensor],
    processes: DataParallel,
    *,
    n_steps: int,
    learning_rate: float,
    weight_decay: float,
) -> Iterator[float]:
    """Take steps down the losses, and yield each before its step; the rate warms up and falls by a cosine."""
    if n_steps == 0:
        return
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=n_steps, pct_start=0.1, cycle_momentum=False
    )
    device = parameters[0].device.type
    for _ in range(n_steps):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = next(losses)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        processes.average(weights.grad for weights in parameters if weights.grad is not None)
        with torch.no_grad():
            processes.average([loss])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
