"""A loaded classifier: uint8 pixels in, float32 probabilities out.

Shapes: ``images_NHWC`` uint8 (N, height, width, 3); ``logits_NC`` and ``probabilities_NC`` float32 (N, classes).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from winnow.config import Precision
from winnow.errors import CallError
from winnow.uncertainty import softmax

if TYPE_CHECKING:
    import torch
    from torch import nn

    from winnow.models.references import ResolvedModel

logger = logging.getLogger(__name__)

ChosenPrecision = Literal["float32", "bfloat16", "float16"]

FUSION_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, for which fused layers count as equal."""


def _cpu_chunk(num_threads: int) -> int:
    """Images per forward pass on a CPU: few, so that intermediate results stay in its caches. See docs/models.md."""
    return max(4, 2 * num_threads)


class Classifier:
    """A network on a device, fused and laid out for speed.

    Attributes:
        model: what was loaded.
        device: as torch names it.
        precision: of the arithmetic: float32, bfloat16 or float16.
    """

    def __init__(
        self, network: nn.Module, model: ResolvedModel, *, device: str = "cpu", precision: Precision = "auto"
    ) -> None:
        """Prepare a float32 network on the CPU, in evaluation mode, which is not used any more afterwards.

        Raises:
            CallError: the device or precision is not available here.
        """
        import torch

        chosen_device = _device(device)
        self.model = model
        self.device = str(chosen_device)
        self.precision: ChosenPrecision = choose_precision(precision, device)
        self._dtype: torch.dtype = getattr(torch, self.precision)
        network.requires_grad_(False)
        height, width = self._input_size = _input_size(model)
        fused = fuse(network, height, width)
        fused = fused.to(device=chosen_device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network = _cast(fused, self._dtype)
        mean = torch.tensor(model.mean, dtype=torch.float32, device=chosen_device).view(1, 3, 1, 1)
        std = torch.tensor(model.std, dtype=torch.float32, device=chosen_device).view(1, 3, 1, 1)
        self._scale, self._shift = 1.0 / (255.0 * std), -mean / std

    def predict(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities, float32 (N, C).

        An image for which the network answered NaN or infinity has NaN in its whole row (``uncertainty.is_answered``);
        the others are not affected.

        Raises:
            ValueError: the images are not uint8 (N, height, width, 3) of the model's size.
        """
        return softmax(self.logits(images_NHWC))

    def logits(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the network answers before softmax, float32 (N, C).

        Raises:
            ValueError: the images are not uint8 (N, height, width, 3) of the model's size.
        """
        import torch

        wanted = (*self._input_size, 3)
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[1:] != wanted:
            raise ValueError(
                f"{self.model.id} takes images as uint8 (N, {wanted[0]}, {wanted[1]}, 3), not as "
                f"{images_NHWC.dtype} {images_NHWC.shape}"
            )
        num_images = len(images_NHWC)
        logits_NC = np.empty((num_images, len(self.model.classes)), dtype=np.float32)
        # torch takes no flipped arrays, and warns about memory that cannot be written, such as that of Arrow
        usable = images_NHWC.flags.writeable and images_NHWC.flags.c_contiguous
        pixels = torch.from_numpy(images_NHWC if usable else images_NHWC.copy(order="C"))
        with torch.inference_mode():
            step = _cpu_chunk(torch.get_num_threads()) if self.device == "cpu" else max(num_images, 1)
            for start in range(0, num_images, step):
                answer = self._forward(pixels[start : start + step])
                logits_NC[start : start + step] = answer.float().cpu().numpy()
        return logits_NC

    def _forward(self, pixels_NHWC: torch.Tensor) -> torch.Tensor:
        """Logits (n, C) on the device, of uint8 (n, H, W, 3), which travel as such; as NCHW they are channels_last."""
        images = pixels_NHWC.to(self._scale.device, non_blocking=True).permute(0, 3, 1, 2).to(self._scale.dtype)
        answer: torch.Tensor = self._network(images.mul_(self._scale).add_(self._shift).to(self._dtype))
        return answer


def choose_precision(requested: Precision, device: str) -> ChosenPrecision:
    """The precision for a device; ``auto`` is the fastest one whose answers equal the reference: float32.

    Not bfloat16, even where that would be faster: its answers differ too often (docs/models.md).

    Raises:
        CallError: float16 on a CPU, or a device that is not there.
    """
    kind = _device(device).type
    if requested == "auto":
        return "float32"
    if requested == "float16" and kind == "cpu":
        raise CallError("precision float16 is for GPUs only; choose auto, float32 or bfloat16")
    if requested == "bfloat16" and kind == "cpu" and not has_native_bfloat16():
        logger.warning(
            "this CPU has no bfloat16 instructions: precision bfloat16 will be many times slower than float32"
        )
    return requested


def has_native_bfloat16() -> bool:
    """True when this CPU computes in bfloat16 (AMX or AVX512_BF16)."""
    import torch

    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def fuse(network: nn.Module, height: int, width: int) -> nn.Module:
    """The network with every batch normalisation folded into the convolution before it.

    As it was, where that cannot be traced or does not give equal logits (``FUSION_TOLERANCE``) on random images.

    Folding as in Jacob et al. 2018, "Quantization and Training of Neural Networks …", section 3.2.
    """
    import torch
    from torch import nn
    from torch.fx.experimental.optimization import fuse as fold

    if not any(type(module) is nn.BatchNorm2d for module in network.modules()):
        return network
    untraceable = (torch.fx.proxy.TraceError, RuntimeError, TypeError, ValueError, AttributeError, LookupError)
    try:
        fused: nn.Module = fold(network)
    except untraceable as error:
        logger.info("batch normalisation is not folded: the network cannot be traced (%s)", error)
        return network
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(images)
        for got, want in ((fused(images), expected), (fused(images[:1]), expected[:1])):
            limit = FUSION_TOLERANCE * max(1.0, float(want.abs().max()))
            if got.shape != want.shape or not float((got - want).abs().max()) <= limit:
                logger.info("batch normalisation is not folded: the logits would differ by more than %g", limit)
                return network
    return fused


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast all but batch normalisation that is left: its statistics need float32."""
    import torch
    from torch import nn

    if dtype is torch.float32:
        return network
    network = network.to(dtype)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
    return network


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise CallError(f"device {name!r} is unknown; choose cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CallError(
            f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; choose cpu"
        )
    return device


def _input_size(model: ResolvedModel) -> tuple[int, int]:
    """(height, width) of the model's view, which always has a fixed size."""
    size: Any = model.view.crop or model.view.resize
    if not isinstance(size, tuple):
        raise CallError(f"{model.id} has a view without a fixed size: {model.view}; give it a crop")
    return size
