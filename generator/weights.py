"""Weights: files of trained networks that packages carry, and how they are run.

Nothing is downloaded at run time. Most of these packages are installed without what they declare: only
their file is read.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


class WeightsMissing(RuntimeError):
    """A package that carries a network's weights is not installed, or lacks their file."""

    def __init__(self, purpose: str, package: str, file: str, instead: str) -> None:
        super().__init__(
            f"{purpose} needs {file} of the package {package}, which is not there: run `make setup`, or {instead}."
        )
        self.package = package


def weights_file(module: str, file: str, *, purpose: str, package: str, instead: str) -> Path:
    """Return where a package keeps a file; the package's code is not run.

    Parameters
    ----------
    module, file
        The package's import name, and the file's path inside it.
    purpose, package, instead
        For the error: what needs the file, the package's name in the registry, and what can be done without it.

    Raises
    ------
    WeightsMissing
        The package or the file is not there.
    """
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / file).is_file():
            return path
    raise WeightsMissing(purpose, package, file, instead)


def open_session(path: Path) -> InferenceSession:
    """Open an ONNX file on the CPU with one thread: as many as there are cores would take them from everybody else."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
