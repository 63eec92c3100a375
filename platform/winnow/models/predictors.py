"""Loaded models: uint8 pixels in, answers out. Models that see the same pixels through the same backbone share it.

Legend: N images, H × W pixels of the view, D features, C classes. ``images_NHWC`` is uint8 (N, H, W, 3).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate

from winnow.augment import carry_back
from winnow.config import Precision
from winnow.errors import CallError
from winnow.masks import LabelMap, label_dtype
from winnow.models.networks import Network, fingerprint
from winnow.uncertainty import disagreement, disagreement_of_sets, sigmoid, softmax

if TYPE_CHECKING:
    from winnow.augment import Policy
    from winnow.models.references import ResolvedModel

logger = logging.getLogger(__name__)

ChosenPrecision = Literal["float32", "bfloat16", "float16"]
Float32s = NDArray[np.float32]

FUSION_TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest one, for which fused layers count as equal."""

_GPU_MASK_NUMBERS = 2**28
"""Logits of masks that are held at once on a GPU."""


@dataclass(frozen=True)
class MaskAnswer:
    """The mask of one image, at the resolution at which it was answered.

    Attributes:
        labels_HW: class of every pixel, of the type ``masks.label_dtype``; (H, W) of the part of the view that shows
            the image.
        confidence_C: mean probability of the class over its pixels, float32; NaN for classes not found.
        entropy_C: mean entropy over the pixels of the class, in nats, float32; NaN for classes not found.
        disagreement_C: mean disagreement of the views over the pixels of the class, likewise; None for one view.
    """

    labels_HW: LabelMap
    confidence_C: Float32s
    entropy_C: Float32s
    disagreement_C: Float32s | None = None


def _probabilities(logits: Tensor, model: ResolvedModel) -> Float32s:
    """Of each class, float32 (N, C): of one, or where an image may have several, of each on its own."""
    scaled_NC = logits.float().cpu().numpy() / model.temperature
    return sigmoid(scaled_NC) if model.multi_label else softmax(scaled_NC)


class Predictor:
    """One backbone on a device, fused and laid out for speed, and the heads of all models that use it.

    Attributes:
        models: what was loaded, by name.
        device: as torch names it.
        precision: of the arithmetic: float32, bfloat16 or float16.
    """

    def __init__(
        self,
        models: Mapping[str, ResolvedModel],
        backbone: nn.Module,
        heads: Mapping[str, nn.Module | None],
        *,
        device: str = "cpu",
        precision: Precision = "auto",
    ) -> None:
        """Prepare float32 modules on the CPU, in evaluation mode, which are not used any more afterwards.

        Args:
            models: by name; all with the same view, mean and standard deviation.
            backbone: of all of them.
            heads: of each model, by name; None where the backbone itself answers.
            device: as torch names it.
            precision: of the arithmetic; ``auto`` is float32.

        Raises:
            CallError: the device or precision is not available here.
        """
        chosen_device = _device(device)
        first = next(iter(models.values()))
        self.models = dict(models)
        self.device = str(chosen_device)
        self.precision: ChosenPrecision = choose_precision(precision, device)
        self._dtype: torch.dtype = getattr(torch, self.precision)
        self._size = _input_size(first)
        backbone.requires_grad_(False)
        backbone = fuse(backbone, *self._size)
        backbone = backbone.to(device=chosen_device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._backbone = _cast(backbone, self._dtype)
        self._heads: dict[str, nn.Module | None] = {}
        for name, head in heads.items():
            if head is not None:
                head.requires_grad_(False)
                head = _cast(head.to(device=chosen_device), self._dtype)
            self._heads[name] = head
        mean = torch.tensor(first.mean, dtype=torch.float32, device=chosen_device).view(1, 3, 1, 1)
        std = torch.tensor(first.std, dtype=torch.float32, device=chosen_device).view(1, 3, 1, 1)
        self._scale, self._shift = 1.0 / (255.0 * std), -mean / std

    def predict(self, images_NHWC: NDArray[np.uint8], sizes: Sequence[tuple[int, int]] | None = None) -> dict[str, Any]:
        """Answers of every model, by name: probabilities float32 (N, C), vectors float32 (N, D) of length 1, or masks.

        An image for which a network answered NaN or infinity has NaN in its whole row, or None instead of a mask; the
        others are not affected.

        Args:
            images_NHWC: uint8 (N, H, W, 3) of the models' size, N at least 1.
            sizes: (width, height) of each source image, which tell the part of the view that shows it; without them,
                all of it. Only masks need them.

        Raises:
            ValueError: the images are not uint8 (N, H, W, 3) of the models' size.
        """
        found: dict[str, list[Any]] = {name: [] for name in self.models}
        for start, outputs in self._forward(images_NHWC):
            for name, output in outputs.items():
                model = self.models[name]
                if model.output == "masks":
                    shown = sizes[start : start + len(output)] if sizes is not None else [None] * len(output)
                    found[name] += [self._mask(logits, model, size) for logits, size in zip(output, shown, strict=True)]
                elif model.output == "features":
                    found[name].append(normalise(output.float().cpu().numpy()))
                else:
                    found[name].append(_probabilities(output, model))
        return {
            name: parts if self.models[name].output == "masks" else np.concatenate(parts)
            for name, parts in found.items()
        }

    def predict_views(
        self,
        names: Sequence[str],
        policy: Policy,
        num_views: int,
        images_NHWC: NDArray[np.uint8],
        image_ids: Sequence[str],
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Any]:
        """Mean answers over the images and augmented views of them, by name.

        Mean probabilities (N, C) with the disagreement (N,) of the views; the mean vector, again of length 1, (N, D);
        or masks of the mean probabilities of each pixel, over the views that show it.

        Args:
            names: of the models asked.
            policy: of the augmented views.
            num_views: the images themselves included.
            images_NHWC: as in ``predict``.
            image_ids: N ids, which seed the views.
            sizes: as in ``predict``.

        Raises:
            ValueError: as ``predict``.
            AugmentError: the policy cannot be applied to images of this size.
        """
        found: dict[str, list[Any]] = {name: [] for name in names}
        with_masks = any(self.models[name].output == "masks" for name in names)
        step = self._chunk(len(images_NHWC))
        for start in range(0, len(images_NHWC), step):
            part_NHWC, ids = images_NHWC[start : start + step], image_ids[start : start + step]
            answers: dict[str, list[Any]] = {name: [] for name in names}
            means = {name: [PixelMean() for _ in ids] for name in names}
            for views_NHWC, maps_NHW in policy.views(part_NHWC, ids, num_views, maps=with_masks):
                ((_, outputs),) = self._forward(views_NHWC)  # of no more images than one pass takes
                for name in names:
                    model, output = self.models[name], outputs[name]
                    if model.output == "masks":
                        assert maps_NHW is not None
                        for mean, logits_CHW, map_HW in zip(means[name], output, maps_NHW, strict=True):
                            mean.add(torch.softmax(logits_CHW / model.temperature, dim=0), torch.tensor(map_HW))
                    elif model.output == "features":
                        answers[name].append(normalise(output.float().cpu().numpy()))
                    else:
                        answers[name].append(_probabilities(output, model))
            for name in names:
                model = self.models[name]
                if model.output == "masks":
                    shown = sizes[start : start + step] if sizes is not None else [None] * len(ids)
                    found[name] += [
                        self._mask_of_mean(mean, model, size) for mean, size in zip(means[name], shown, strict=True)
                    ]
                else:
                    found[name].append(np.stack(answers[name]))
        return {name: self._averaged(name, parts) for name, parts in found.items()}

    def _averaged(self, name: str, parts: list[Any]) -> Any:
        if self.models[name].output == "masks":
            return parts
        answers_VN = np.concatenate(parts, axis=1)
        mean_N = answers_VN.mean(axis=0, dtype=np.float64).astype(np.float32)
        if self.models[name].output == "features":
            return normalise(mean_N)
        return mean_N, disagreement_of_sets(answers_VN) if self.models[name].multi_label else disagreement(answers_VN)

    def outputs(self, images_NHWC: NDArray[np.uint8]) -> dict[str, Float32s]:
        """What the networks answer before softmax and normalisation, by name.

        Logits (N, C), features (N, D), or logits of masks (N, C, H, W), brought to the size of the view.

        Raises:
            ValueError: as ``predict``.
        """
        found: dict[str, list[Float32s]] = {name: [] for name in self.models}
        for _, outputs in self._forward(images_NHWC):
            for name, output in outputs.items():
                found[name].append(output.float().cpu().numpy())
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def features(self, images_NHWC: NDArray[np.uint8]) -> Iterator[list[Float32s]]:
        """What the backbone gives to the heads, of one chunk of images after the other.

        One array of features (n, D), or one (n, D, height, width) per map, from fine to coarse.

        Raises:
            ValueError: as ``predict``.
        """
        for _, pixels in self._chunks(images_NHWC):
            with torch.inference_mode():
                features = self._features(pixels)
                maps = [features] if isinstance(features, Tensor) else list(features)
                yield [values.float().cpu().numpy() for values in maps]

    def _forward(self, images_NHWC: NDArray[np.uint8]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Number of its first image, and outputs on the device by name, of one chunk of images after the other."""
        for start, pixels in self._chunks(images_NHWC):
            with torch.inference_mode():
                outputs = self._outputs(pixels)
            yield start, outputs

    def _chunks(self, images_NHWC: NDArray[np.uint8]) -> Iterator[tuple[int, Tensor]]:
        """Number of its first image, and pixels, of one chunk of images after the other."""
        wanted = (*self._size, 3)
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[1:] != wanted:
            raise ValueError(
                f"{', '.join(model.id for model in self.models.values())} takes images as uint8 (N, {wanted[0]}, "
                f"{wanted[1]}, 3), not as {images_NHWC.dtype} {images_NHWC.shape}"
            )
        # torch takes no flipped arrays, and warns about memory that cannot be written, such as that of Arrow
        usable = images_NHWC.flags.writeable and images_NHWC.flags.c_contiguous
        pixels = torch.from_numpy(images_NHWC if usable else images_NHWC.copy(order="C"))
        step = self._chunk(len(images_NHWC))
        for start in range(0, len(images_NHWC), step):
            yield start, pixels[start : start + step]

    def _features(self, pixels_NHWC: Tensor) -> Any:
        """What the backbone gives, on the device. uint8 (n, H, W, 3) travel as such; as NCHW they are channels_last."""
        images = pixels_NHWC.to(self._scale.device, non_blocking=True).permute(0, 3, 1, 2).to(self._scale.dtype)
        return self._backbone(images.mul_(self._scale).add_(self._shift).to(self._dtype))

    def _outputs(self, pixels_NHWC: Tensor) -> dict[str, Tensor]:
        """Outputs of all models on the device, by name."""
        features = self._features(pixels_NHWC)
        outputs = {}
        for name, head in self._heads.items():
            output = features if head is None else head(features)
            if self.models[name].output == "masks":
                output = interpolate(output.float(), size=self._size, mode="bilinear", align_corners=False)
            outputs[name] = output
        return outputs

    def _chunk(self, num_images: int) -> int:
        """Images per forward pass. On a CPU few, so that results on the way stay in its caches: docs/models.md."""
        height, width = self._size
        if self.device == "cpu":
            return max(1, round(max(4, 2 * torch.get_num_threads()) * 224 * 224 / (height * width)))
        numbers = [height * width * len(model.classes) for model in self.models.values() if model.output == "masks"]
        return max(1, _GPU_MASK_NUMBERS // max(numbers)) if numbers else max(1, num_images)

    def _mask(self, logits_CHW: Tensor, model: ResolvedModel, size: tuple[int, int] | None) -> MaskAnswer | None:
        """Classes of the pixels that show the image, and how sure they are; None where any is not finite."""
        logits_CHW = _shown(logits_CHW, model, size)
        return self._described(torch.log_softmax(logits_CHW / model.temperature, dim=0), model)

    def _mask_of_mean(self, mean: PixelMean, model: ResolvedModel, size: tuple[int, int] | None) -> MaskAnswer | None:
        """The same of the mean over views."""
        mean_CHW, disagreement_HW = mean.result()
        # A probability of 0 has no logarithm; the smallest number does, and adds nothing to the entropy.
        log_CHW = _shown(mean_CHW, model, size).clamp_min(torch.finfo(torch.float32).tiny).log()
        return self._described(log_CHW, model, _shown(disagreement_HW[None], model, size)[0])

    def _described(
        self, log_CHW: Tensor, model: ResolvedModel, disagreement_HW: Tensor | None = None
    ) -> MaskAnswer | None:
        best_HW, labels_HW = log_CHW.max(dim=0)
        entropy_HW = -(log_CHW.exp() * log_CHW).sum(dim=0)
        if not bool(torch.isfinite(best_HW).all()) or not bool(torch.isfinite(entropy_HW).all()):
            return None
        num_classes = len(model.classes)
        labels: Any = labels_HW.to(torch.int32).cpu().numpy().astype(label_dtype(num_classes))
        flat = labels.reshape(-1)
        counts_C = np.bincount(flat, minlength=num_classes)
        measures = [best_HW.exp(), entropy_HW, *(() if disagreement_HW is None else (disagreement_HW,))]
        with np.errstate(invalid="ignore"):  # 0 / 0 where a class was not found
            means_C = [
                (np.bincount(flat, values.cpu().numpy().reshape(-1), num_classes) / counts_C).astype(np.float32)
                for values in measures
            ]
        return MaskAnswer(labels, *means_C)


class PixelMean:
    """Mean over views of the class probabilities of each pixel, in the places of the original image."""

    def __init__(self) -> None:
        self._sums_CHW: Tensor | None = None
        self._entropies_HW = self._num_views_HW = torch.zeros(())

    def add(self, probabilities_CHW: Tensor, map_HW: Tensor) -> None:
        """Add a view: its probabilities, float32 (C, H, W), and its map, see ``winnow.augment``."""
        sums_CHW, counts_HW = carry_back(probabilities_CHW, map_HW)
        means_CHW = sums_CHW / counts_HW.clamp_min(1)  # 0 throughout where the view shows nothing of a pixel
        if self._sums_CHW is None:
            self._sums_CHW = torch.zeros_like(means_CHW)
            self._entropies_HW, self._num_views_HW = torch.zeros_like(counts_HW), torch.zeros_like(counts_HW)
        self._sums_CHW += means_CHW
        self._entropies_HW += torch.special.entr(means_CHW).sum(dim=0)
        self._num_views_HW += counts_HW > 0

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean (C, H, W) over the views that show a pixel, and their disagreement (H, W).

        As ``uncertainty.disagreement`` defines it.
        """
        assert self._sums_CHW is not None
        mean_CHW = self._sums_CHW / self._num_views_HW
        excess_HW = torch.special.entr(mean_CHW).sum(dim=0) - self._entropies_HW / self._num_views_HW
        return mean_CHW, excess_HW.clamp_min(0)


def _shown(values_CHW: Tensor, model: ResolvedModel, size: tuple[int, int] | None) -> Tensor:
    """The part of a view that shows the image, of (width, height) at the source."""
    if size is None:
        return values_CHW
    width, height = model.view.target(*size)
    return values_CHW[:, :height, :width]


def predictors_of(
    loaded: Mapping[str, tuple[ResolvedModel, Network]], *, device: str = "cpu", precision: Precision = "auto"
) -> list[Predictor]:
    """Predictors that answer all models between them; those that share pixels and a backbone are one predictor.

    Raises:
        CallError: the device or precision is not available here.
    """
    groups: dict[Any, list[str]] = {}
    for name, (model, network) in loaded.items():
        key = model.view, model.mean, model.std, fingerprint(network.backbone)
        groups.setdefault(key, []).append(name)
    return [
        Predictor(
            {name: loaded[name][0] for name in names},
            loaded[names[0]][1].backbone,
            {name: loaded[name][1].head for name in names},
            device=device,
            precision=precision,
        )
        for names in groups.values()
    ]


def normalise(vectors_ND: NDArray[Any]) -> Float32s:
    """Vectors of length 1 (L2), float32 (N, D). A vector that is not finite, or is zero, is NaN throughout."""
    wide_ND = vectors_ND.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        lengths_N1 = np.sqrt(np.square(wide_ND).sum(axis=1, keepdims=True))
        unit_ND: Float32s = (wide_ND / lengths_N1).astype(np.float32)
    unit_ND[~np.isfinite(unit_ND).all(axis=1)] = np.nan
    return unit_ND


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
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def fuse(network: nn.Module, height: int, width: int) -> nn.Module:
    """The network with every batch normalisation folded into the convolution before it.

    As it was, where that cannot be traced or does not give equal outputs (``FUSION_TOLERANCE``) on random images.

    Folding as in Jacob et al. 2018, "Quantization and Training of Neural Networks …", section 3.2.
    """
    from torch.fx.experimental.optimization import fuse as fold

    if not any(type(module) is nn.BatchNorm2d for module in network.modules()):
        return network
    untraceable = (torch.fx.proxy.TraceError, RuntimeError, TypeError, ValueError, AttributeError, LookupError)
    try:
        # A copy of torchvision's feature extractors begins in training mode, whatever the original is in.
        fused: nn.Module = fold(copy.deepcopy(network).eval(), inplace=True)
    except untraceable as error:
        logger.info("batch normalisation is not folded: the network cannot be traced (%s)", error)
        return network
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for some in (images, images[:1]):
            if not _are_close(fused(some), network(some)):
                logger.info("batch normalisation is not folded: outputs would differ by more than %g", FUSION_TOLERANCE)
                return network
    return fused


def _are_close(got: Tensor | Sequence[Tensor], want: Tensor | Sequence[Tensor]) -> bool:
    """Whether outputs, or lists of maps, are equal up to ``FUSION_TOLERANCE`` of the largest number."""
    if not isinstance(want, Tensor):
        return len(got) == len(want) and all(_are_close(one, other) for one, other in zip(got, want, strict=True))
    assert isinstance(got, Tensor)
    limit = FUSION_TOLERANCE * max(1.0, float(want.abs().max()))
    return got.shape == want.shape and float((got - want).abs().max()) <= limit


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast all but batch normalisation that is left: its statistics need float32."""
    if dtype is torch.float32:
        return network
    network = network.to(dtype)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
    return network


def _device(name: str) -> torch.device:
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
    if model.view.size is None:
        raise CallError(f"{model.id} has a view without a fixed size: {model.view}; give it a crop")
    return model.view.size
