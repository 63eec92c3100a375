"""Networks in two parts: a backbone that makes features, and a head that answers. Tasks may share the first part.

Legend: N images, H × W pixels, D features, C classes. The only module beside ``predictors`` that imports torch at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from winnow.errors import CallError

SPLIT_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest one, for which backbone and head count as the network."""

STRIDES = (4, 8, 16, 32)
"""Of the maps of a feature pyramid: pixels of the image per step."""

RMS_EPSILON = 1e-6
"""Added to the mean square of an image's features before they are divided by its root."""

PYRAMID_WIDTH = 64
"""Channels in which a ``PyramidHead`` adds up the maps."""


@dataclass(frozen=True)
class Network:
    """What a model computes: ``head(backbone(images))``, or ``backbone(images)`` alone.

    Attributes:
        backbone: normalised images (N, 3, H, W) to features (N, D), to a list of maps from fine to coarse, or to
            answers where there is no head.
        head: features to logits (N, C), or maps to logits (N, C, height, width) of any height and width.
    """

    backbone: nn.Module
    head: nn.Module | None = None

    def eval(self) -> Network:
        """Both parts in evaluation mode."""
        self.backbone.eval()
        if self.head is not None:
            self.head.eval()
        return self


# ------------------------------------------------------------------------------------------------------ classification


def classifier_name(network: nn.Module, num_classes: int) -> str | None:
    """Name of the last linear layer with that many outputs, which is where classifiers end; None without one."""
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    return names[-1] if names else None


def split_classifier(network: nn.Module, num_classes: int, size: tuple[int, int]) -> Network:
    """The classifier as backbone and linear head where that gives the same logits, else the whole as backbone.

    The network itself is taken apart and must not be used afterwards.

    Args:
        network: a classifier on the CPU, in evaluation mode.
        num_classes: its outputs.
        size: (height, width) of its images.
    """
    name = classifier_name(network, num_classes)
    if name is None:
        return Network(network)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    head = network.get_submodule(name)
    assert isinstance(head, nn.Linear)
    with torch.inference_mode():
        expected = network(images)
        _replace(network, name, nn.Identity())
        features = network(images)
        if features.ndim == 2 and features.shape[1] == head.in_features:
            limit = SPLIT_TOLERANCE * max(1.0, float(expected.abs().max()))
            if float((head(features) - expected).abs().max()) <= limit:
                return Network(network, head)
    _replace(network, name, head)
    return Network(network)


def without_classifier(network: nn.Module, num_classes: int, size: tuple[int, int], name: str) -> nn.Module:
    """The backbone of a classifier alone: images to features (N, D). A network without classes is one already.

    Raises:
        CallError: the features before the classifier cannot be told apart.
    """
    if num_classes == 0:
        return network
    parts = split_classifier(network, num_classes, size)
    if parts.head is None:
        raise CallError(f"{name} does not end in one linear layer, so its features cannot be had; choose another model")
    return parts.backbone


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)


class RmsLinear(nn.Module):
    """A linear layer on features that are scaled, image by image, to a mean square of 1 (Zhang & Sennrich 2019).

    How strongly an image excites the backbone then tells nothing about its class.

    Args:
        depth: D.
        num_classes: C.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.RMSNorm(depth, eps=RMS_EPSILON, elementwise_affine=False)
        self.linear = nn.Linear(depth, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.scale(features))
        return logits


# -------------------------------------------------------------------------------------------------------- segmentation


class Segmenter(nn.Module):
    """A segmentation network of torchvision that answers with its logits (N, C, H, W) alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)["out"]
        return logits


class Pyramid(nn.Module):
    """The maps of a torchvision classifier at ``STRIDES``, as a list from fine to coarse."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.extractor(images)
        return [maps[str(stride)] for stride in STRIDES]


class PyramidHead(nn.Module):
    """A light decoder: maps from fine to coarse to logits (N, C) at the resolution of the finest.

    Every map is brought to ``width`` channels and added to the enlarged sum of the coarser ones, as in the feature
    pyramid of Lin et al. 2017, figure 3; one 3 × 3 convolution over the sum, then the classes.

    Args:
        channels: of each map.
        num_classes: C.
        width: channels of the sum.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, width: int = PYRAMID_WIDTH) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(depth, width, 1) for depth in channels)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        total: Tensor | None = None
        for index in reversed(range(len(self.lateral))):
            wide = self.lateral[index](maps[index])
            if total is not None:
                wide = wide + interpolate(total, size=wide.shape[-2:], mode="bilinear", align_corners=False)
            total = wide
        logits: Tensor = self.classify(self.smooth(total))
        return logits


class TimmPyramid(nn.Module):
    """The last four feature maps of a timm network, from fine to coarse, by timm's own feature extraction."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.network.forward_intermediates(images, indices=4, intermediates_only=True)  # type: ignore[operator]
        return maps


def maps_of(network: nn.Module, num_classes: int, architecture: str) -> nn.Module:
    """The feature maps of a classifier, which must not be used afterwards: images to a list from fine to coarse.

    Raises:
        CallError: it gives none.
    """
    name = classifier_name(network, num_classes) if num_classes else None
    if name is not None:  # weights that no map needs
        _replace(network, name, nn.Identity())
    if architecture.startswith("torchvision/"):
        return _torchvision_pyramid(network, architecture)
    if not hasattr(network, "forward_intermediates"):
        raise CallError(f"{architecture} gives no feature maps, which masks need; choose another model")
    return TimmPyramid(network)


def _torchvision_pyramid(network: nn.Module, name: str) -> Pyramid:
    """What the last block of each stride gives, by torchvision's own feature extraction.

    Raises:
        CallError: the network makes no maps at these strides.
    """
    from torchvision.models.feature_extraction import create_feature_extractor

    refused = CallError(
        f"{name} does not make feature maps at the strides {', '.join(map(str, STRIDES))}, which masks need; choose a "
        "convolutional network such as torchvision/mobilenet_v2, torchvision/resnet50 or one of timm"
    )
    blocks = _blocks(network)
    if not blocks:
        raise refused
    side = 128
    try:
        probe = create_feature_extractor(network, return_nodes={block: block for block in blocks})
        with torch.inference_mode():
            shapes = {block: tuple(found.shape) for block, found in probe(torch.zeros(1, 3, side, side)).items()}
    except (ValueError, RuntimeError, TypeError, AttributeError, torch.fx.proxy.TraceError):
        raise refused from None
    last = {
        side // shape[2]: block
        for block, shape in shapes.items()
        if len(shape) == 4 and shape[2] == shape[3] and side % shape[2] == 0
    }
    if not set(STRIDES) <= set(last):
        raise refused
    return Pyramid(create_feature_extractor(network, return_nodes={last[stride]: str(stride) for stride in STRIDES}))


def _blocks(network: nn.Module) -> list[str]:
    """Names of the blocks of a torchvision classifier, in order of execution."""
    for container in ("features", "trunk_output", "layers"):
        if isinstance(getattr(network, container, None), nn.Sequential):
            return [f"{container}.{name}" for name, _ in getattr(network, container).named_children()]
    return [name for name, _ in network.named_children() if name.startswith(("layer", "stage"))]


def pyramid_channels(pyramid: nn.Module, size: tuple[int, int]) -> list[int]:
    """Channels of each map, from fine to coarse, for images of that (height, width)."""
    with torch.inference_mode():
        return [int(found.shape[1]) for found in pyramid(torch.zeros(1, 3, *size))]


# ------------------------------------------------------------------------------------------------------------- weights


def fingerprint(backbone: nn.Module) -> str:
    """Hex SHA-256 over all weights with their names: equal for backbones that compute the same."""
    digest = hashlib.sha256(type(backbone).__name__.encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state_of(network: Network) -> dict[str, Tensor]:
    """All weights as they stand in a version's file: keys begin with ``backbone.`` and ``head.``."""
    return {
        f"{part}.{key}": tensor.detach().cpu().contiguous()
        for part, module in (("backbone", network.backbone), ("head", network.head))
        if module is not None
        for key, tensor in module.state_dict().items()
    }
