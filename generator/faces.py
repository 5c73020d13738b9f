"""Faces: finds people's faces in a picture with MTCNN (Zhang et al., 2016, arXiv:1604.02878).

Three small networks: the first looks at every place of an image pyramid, the second and the third look again
at what is left. Their weights come from the package facenet-pytorch; only its files are read.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from generator.weights import weights_file

Floats = npt.NDArray[np.float32]
_N = TypeVar("_N", bound=nn.Module)

_CELL_PX: Final = 12
"""Side of what the first network looks at, in pixels of a pyramid level; its answers lie ``_STRIDE_PX`` apart."""

_STRIDE_PX: Final = 2
_SHRINK: Final = 0.709  # from one pyramid level to the next: half the area
_MIN_P: Final = (0.6, 0.7)  # what the first and the second network must say for a place to be looked at again


class Face(NamedTuple):
    """A face: its box in pixels, and the last network's probability that it is one."""

    left: float
    top: float
    right: float
    bottom: float
    p_face: float


class _Convolutions(nn.Module):
    """What the three networks share: convolutions, each with its PReLU and most with a max-pooling behind."""

    def __init__(self, channels: tuple[int, ...], kernels: tuple[int, ...], pools: tuple[int, ...]) -> None:
        super().__init__()
        self._pools = pools
        for place, (kernel, n_in, n_out) in enumerate(zip(kernels, (3, *channels), channels, strict=False), 1):
            self.add_module(f"conv{place}", nn.Conv2d(n_in, n_out, kernel))
            self.add_module(f"prelu{place}", nn.PReLU(n_out))

    def convolve(self, x: Tensor) -> Tensor:
        for place, pool in enumerate(self._pools, 1):
            x = self.get_submodule(f"prelu{place}")(self.get_submodule(f"conv{place}")(x))
            if pool:
                x = max_pool2d(x, pool, 2, ceil_mode=True)
        return x


class _ProposalNet(_Convolutions):
    def __init__(self) -> None:
        super().__init__((10, 16, 32), (3, 3, 3), (2, 0, 0))
        self.conv4_1 = nn.Conv2d(32, 2, 1)
        self.conv4_2 = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convolve(x)  # (1, 32, h, w)
        return self.conv4_1(x).softmax(1)[0, 1], self.conv4_2(x)[0]  # (h, w), (4, h, w)


class _RefinementNet(_Convolutions):
    def __init__(self) -> None:
        super().__init__((28, 48, 64), (3, 3, 2), (3, 3, 0))
        self.dense4 = nn.Linear(576, 128)
        self.prelu4 = nn.PReLU(128)
        self.dense5_1 = nn.Linear(128, 2)
        self.dense5_2 = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convolve(x).permute(0, 3, 2, 1).flatten(1)  # (n, 576); width first, as the weights were trained
        x = self.prelu4(self.dense4(x))
        return self.dense5_1(x).softmax(1)[:, 1], self.dense5_2(x)  # (n,), (n, 4)


class _OutputNet(_Convolutions):
    def __init__(self) -> None:
        super().__init__((32, 64, 64, 128), (3, 3, 3, 2), (3, 3, 2, 0))
        self.dense5 = nn.Linear(1152, 256)
        self.prelu5 = nn.PReLU(256)
        self.dense6_1 = nn.Linear(256, 2)
        self.dense6_2 = nn.Linear(256, 4)
        self.dense6_3 = nn.Linear(256, 10)  # eyes, nose and mouth, which nobody asks for; they are in the weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convolve(x).permute(0, 3, 2, 1).flatten(1)  # (n, 1152)
        x = self.prelu5(self.dense5(x))
        return self.dense6_1(x).softmax(1)[:, 1], self.dense6_2(x)  # (n,), (n, 4)


class FaceDetector:
    """Finds faces that are turned towards the viewer; the same picture gives the same faces.

    Parameters
    ----------
    min_side
        Smallest face, as a share of the picture's shorter side.
    min_p
        Least probability of a face.

    Raises
    ------
    generator.weights.WeightsMissing
        The package facenet-pytorch is not there.
    """

    def __init__(self, *, min_side: float, min_p: float) -> None:
        self._min_side = min_side
        self._min_p = min_p
        self._proposals = _load(_ProposalNet(), "pnet")
        self._refinement = _load(_RefinementNet(), "rnet")
        self._output = _load(_OutputNet(), "onet")

    @torch.inference_mode()
    def find(self, image: Image.Image) -> list[Face]:
        """Return the faces of a picture, surest first."""
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1).copy())
        normal = ((pixels - 127.5) / 128)[None]  # (1, 3, H, W)
        found = self._propose(normal)
        found = self._look_again(self._refinement, normal, 24, found, _MIN_P[1])
        found = found[_apart(found, 0.7)]
        found = self._look_again(self._output, normal, 48, found, self._min_p)
        return [Face(*map(float, row)) for row in found[_apart(found, 0.7, of_smaller=True)]]

    def _propose(self, normal: Tensor) -> Floats:
        """Return squares that may hold a face, (n, 5): left, top, right, bottom, probability."""
        height, width = normal.shape[2:]
        shorter = min(height, width)
        scale = _CELL_PX / max(self._min_side * shorter, _CELL_PX)
        levels = [np.zeros((0, 5), np.float32)]
        while shorter * scale >= _CELL_PX:
            level = interpolate(normal, (int(height * scale + 1), int(width * scale + 1)), mode="area")
            p_face, shift = (answer.numpy() for answer in self._proposals(level))  # (h, w), (4, h, w)
            y, x = np.nonzero(p_face >= _MIN_P[0])
            corner = np.stack([x, y], axis=1) * _STRIDE_PX
            boxes = np.concatenate([(corner + 1) // scale, (corner + _CELL_PX) // scale], axis=1)  # (n, 4)
            squares = np.column_stack([_moved(boxes, shift[:, y, x].T), p_face[y, x]])
            levels.append(squares[_apart(np.column_stack([boxes, p_face[y, x]]), 0.5)].astype(np.float32))
            scale *= _SHRINK
        found = np.concatenate(levels)
        return found[_apart(found, 0.7)]

    @staticmethod
    def _look_again(network: nn.Module, normal: Tensor, side_px: int, found: Floats, min_p: float) -> Floats:
        """Show a network what was found, each as a square of ``side_px``; return what it takes for faces, (m, 5)."""
        squares = _squared(found)
        inside = np.clip(squares[:, :4].astype(int), 0, np.tile(normal.shape[:1:-1], 2))  # (n, 4)
        whole = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
        squares, inside = squares[whole], inside[whole]
        if not len(squares):
            return np.zeros((0, 5), np.float32)
        crops = [
            interpolate(normal[:, :, top:bottom, left:right], (side_px, side_px), mode="area")
            for left, top, right, bottom in inside
        ]
        p_face, shift = (answer.numpy() for answer in network(torch.cat(crops)))  # (n,), (n, 4)
        kept = p_face >= min_p
        moved = _moved(squares[kept, :4], shift[kept])
        return np.asarray(np.column_stack([moved, p_face[kept]]), np.float32)


def _load(network: _N, name: str) -> _N:
    path = weights_file(
        "facenet_pytorch",
        f"data/{name}.pt",
        purpose="refusing portraits",
        package="facenet-pytorch (with --no-deps)",
        instead="set generator.checks.portraits to false to publish without that check",
    )
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


def _moved(boxes: Floats, shift: Floats) -> Floats:
    """Return boxes whose sides were moved by shares of their width and height, (n, 4)."""
    size = np.tile(boxes[:, 2:4] - boxes[:, :2], 2)
    return np.asarray(boxes[:, :4] + shift * size, np.float32)


def _squared(found: Floats) -> Floats:
    """Return boxes made square around their middles, by their longer side."""
    half = (found[:, 2:4] - found[:, :2]).max(axis=1, initial=0.0, keepdims=True) / 2
    middle = (found[:, :2] + found[:, 2:4]) / 2
    return np.column_stack([middle - half, middle + half, found[:, 4]]).astype(np.float32)


def _apart(found: Floats, most: float, *, of_smaller: bool = False) -> list[int]:
    """Return which boxes to keep, surest first: none that overlaps a surer one by more than ``most``.

    The overlap is a share of the union, or of the smaller of the two boxes.
    """
    left, top, right, bottom, p_face = found.T
    area = (right - left) * (bottom - top)
    waiting = np.argsort(-p_face, kind="stable")
    kept: list[int] = []
    while len(waiting):
        best, others = waiting[0], waiting[1:]
        kept.append(int(best))
        width = np.minimum(right[best], right[others]) - np.maximum(left[best], left[others])
        height = np.minimum(bottom[best], bottom[others]) - np.maximum(top[best], top[others])
        common = np.maximum(width, 0) * np.maximum(height, 0)
        whole = np.minimum(area[best], area[others]) if of_smaller else area[best] + area[others] - common
        waiting = others[common <= most * whole]
    return kept
