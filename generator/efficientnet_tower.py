"""EfficientNet-Lite0 as a vision tower: its last layer's 7 x 7 grid, frozen, as 49 image tokens."""

from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from generator.frozen_tower import FrozenTower, empty_network, pretrained_network

PATCH_PX: Final = 32
"""Side of the part of a picture that one token stands for."""


class EfficientNetTowerConfig(PreTrainedConfig):
    """The tower's configuration: nothing but the width of its tokens."""

    model_type = "efficientnet_lite0_tower"
    base_config_key = "vision_config"

    hidden_size: int = 1280


class EfficientNetTower(FrozenTower):
    """EfficientNet-Lite0 without its classifier."""

    config: EfficientNetTowerConfig

    def __init__(self, config: EfficientNetTowerConfig) -> None:
        super().__init__(config)
        self.network: Any = _without_classifier(empty_network())
        self.freeze()

    def look(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return 49 tokens of width 1280 for each picture."""
        grid: torch.Tensor = self.network.extract_features(pixels)  # (n, 1280, 7, 7)
        return grid.flatten(2).transpose(1, 2)  # (n, 49, 1280)

    def load_package_weights(self) -> None:
        """Take the pretrained weights from their package."""
        self.network.load_state_dict(_without_classifier(pretrained_network()).state_dict())


def _without_classifier(network: Any) -> Any:
    network._fc = torch.nn.Identity()
    return network


AutoConfig.register(EfficientNetTowerConfig.model_type, EfficientNetTowerConfig)
AutoModel.register(EfficientNetTowerConfig, EfficientNetTower)
