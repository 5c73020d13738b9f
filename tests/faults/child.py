"""What every child of a fault test does: it writes to a log of its own, and says when it can be told to stop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

log = logging.getLogger(__name__)

_CAN_STOP = "can be told to stop"


def live_as_child(log_path: Path) -> Callable[[], bool]:
    """Send what this process prints to a log, take signals, and return whether one has come."""
    from osmf.commands.common import until_signal

    output = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")
    logging.getLogger("kafka").setLevel(logging.WARNING)
    stop = until_signal().is_set
    log.info(_CAN_STOP)
    return stop


def end(process: BaseProcess, log_path: Path) -> None:
    """End a child in order, once it is far enough to end in order: before, a signal kills it like any process."""
    while f" {process.pid} INFO {_CAN_STOP}" not in log_path.read_text():
        assert process.exitcode is None, log_path.read_text()
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert process.exitcode == 0, log_path.read_text()
