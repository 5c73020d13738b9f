"""What holds for all tests: set before torch and numpy are imported, by them and by the processes that tests start."""

from __future__ import annotations

import os

# Threads that share few cores make every test many times slower.
os.environ["OMP_NUM_THREADS"] = "1"

# No test may reach a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
