"""Bound processes: children that end with their owner, however it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

# Runs in a fresh interpreter that then becomes the command: prctl(PR_SET_PDEATHSIG, SIGTERM) has the kernel
# stop it when its owner dies, however it dies, and the setting outlives execv. A preexec_fn would do the
# same, but may deadlock in an owner that has threads. The check covers an owner that died before the call.
_EXEC_BOUND_TO_OWNER: Final = """\
import ctypes, os, signal, sys
owner, binary = int(sys.argv[1]), sys.argv[2]
if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG): " + os.strerror(ctypes.get_errno()))
if os.getppid() != owner:
    sys.exit("the owner is gone")
os.execv(binary, sys.argv[2:])
"""


def bound_to_this_process(command: Sequence[str]) -> list[str]:
    """Return the command of a child that gets SIGTERM when this process ends; on Linux, elsewhere it does not.

    ``command`` names its program by an absolute path. To be started by the thread that lives longest: the kernel
    takes the end of the thread that started a child for the end of the owner.
    """
    return [sys.executable, "-ISc", _EXEC_BOUND_TO_OWNER, str(os.getpid()), *command]
