"""Augmentation: a policy of the configuration as transforms of ``torchvision.transforms.v2``, repeatable by image.

The same policy, seed, image id and view number give the same pixels on every run, in any order and on any thread of any
process. Masks move together with their images.

Legend: N images, V views, C classes, H × W pixels; ``images_NHWC`` uint8 RGB; ``mask_HW`` a label map, see
``winnow.masks``; ``map_HW`` int32, of each pixel the 1-based index (row-major) of the pixel of the original that it
shows, 0 for none.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from winnow.config import AugmentationConfig
from winnow.errors import AugmentError, CallError
from winnow.masks import LabelMap, unlabelled

if TYPE_CHECKING:
    import torch
    from torchvision.transforms import v2

COPY_NAME = r"/([0-9a-f]{32})-[0-9a-f]{12}-[0-9]+\.(?:png|jpg)$"
"""How the URI of an augmented copy ends; group 1 is the image_id of its original."""

_CONTAINERS = ("Compose", "RandomApply", "RandomChoice", "RandomOrder")
_IMAGES_ONLY = ("AugMix", "AutoAugment", "RandAugment", "TrivialAugmentWide")
"""torchvision moves no mask with these."""

TRANSFORMS = (
    *_CONTAINERS,
    *_IMAGES_ONLY,
    *("CenterCrop", "ElasticTransform", "Pad", "RandomAffine", "RandomCrop", "RandomHorizontalFlip"),
    *("RandomPerspective", "RandomResize", "RandomResizedCrop", "RandomRotation", "RandomShortestSize"),
    *("RandomVerticalFlip", "RandomZoomOut", "Resize", "ScaleJitter"),
    *("ColorJitter", "GaussianBlur", "GaussianNoise", "Grayscale", "RandomAdjustSharpness"),
    *("RandomAutocontrast", "RandomChannelPermutation", "RandomEqualize", "RandomErasing", "RandomGrayscale"),
    *("RandomInvert", "RandomPhotometricDistort", "RandomPosterize", "RandomSolarize"),
)
"""Every transform that a policy may use: uint8 RGB in, uint8 RGB out, one image for one."""

_REFUSED = {
    "it changes the type or the scale of the values, which the model's own preprocessing does": (
        *("ConvertImageDtype", "LinearTransformation", "Normalize", "PILToTensor", "RGB", "ToDtype", "ToImage"),
        *("ToPILImage", "ToPureTensor", "ToTensor"),
    ),
    "it is about boxes and key points": (
        *("ClampBoundingBoxes", "ClampKeyPoints", "ConvertBoundingBoxFormat", "RandomIoUCrop"),
        *("SanitizeBoundingBoxes", "SanitizeKeyPoints", "SetClampingMode"),
    ),
    "it makes several images of one": ("FiveCrop", "TenCrop"),
    "it mixes several images and their labels": ("CutMix", "MixUp"),
    "it is not described by parameters": ("Identity", "Lambda", "Transform"),
    "it is about videos": ("UniformTemporalSubsample",),
    "torchvision 0.29 deprecates what it is made of": ("JPEG",),
}
_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")

# torchvision draws from torch's global generator, so one image at a time has it.
_lock = threading.Lock()


@dataclass(frozen=True)
class Policy:
    """Transforms in order, with their seed. Cheap to hold and to send; torch is imported when it is first used.

    Attributes:
        name: of the ``[augmentations.NAME]`` section.
        transforms: as in the configuration: ``name`` and parameters.
        seed: another one gives other views.
    """

    name: str
    transforms: tuple[Mapping[str, Any], ...]
    seed: int = 0

    @classmethod
    def from_config(cls, name: str, config: AugmentationConfig) -> Self:
        """The policy of a section, checked.

        Raises:
            CallError: a transform is unknown, makes no sense for images, or has wrong parameters.
        """
        policy = cls(name, tuple(config.transforms), config.seed)
        policy._transform  # noqa: B018  built, and so checked
        return policy

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(data["name"], tuple(data["transforms"]), data["seed"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.to_dict()

    @property
    def transforms_json(self) -> str:
        """The transforms on one line."""
        return json.dumps([dict(transform) for transform in self.transforms], sort_keys=True)

    @property
    def digest(self) -> str:
        """Twelve hex digits that another name, transform, parameter or seed changes."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    @property
    def moves_masks(self) -> bool:
        """False when a transform has no meaning for masks."""
        return not set(_names(self.transforms)) & set(_IMAGES_ONLY)

    def check_masks(self) -> None:
        """Refuse a policy that cannot be used for segmentation.

        Raises:
            CallError: a transform of it moves no masks.
        """
        if not self.moves_masks:
            found = ", ".join(sorted(set(_names(self.transforms)) & set(_IMAGES_ONLY)))
            raise CallError(
                f"augmentation {self.name!r} uses {found}, which torchvision does not apply to masks; use other "
                "transforms for segmentation, such as RandomAffine and ColorJitter"
            )

    def check_size(self, height: int, width: int) -> None:
        """Refuse a policy that fails on images of this size.

        Raises:
            CallError: such as a crop that is larger than the image.
        """
        probe_HWC = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        try:
            for view in range(1, 5):
                self.apply(probe_HWC, image_id="probe", view=view)
        except AugmentError as error:
            raise CallError(f"{error}; mend [augmentations.{self.name}]") from None

    def apply(
        self, image_HWC: NDArray[np.uint8], *, image_id: str, view: int, mask_HW: LabelMap | None = None
    ) -> tuple[NDArray[np.uint8], LabelMap | None]:
        """View ``view`` (1, 2, …) of an image, uint8 (H', W', 3), and of its label map, (H', W') of the same type.

        Labels are moved by nearest neighbour; what lies outside of the original is not labelled.

        Raises:
            AugmentError: a transform cannot be applied to this image, or the mask has another size.
        """
        import torch

        if mask_HW is not None and mask_HW.shape != image_HWC.shape[:2]:
            raise AugmentError(
                "bad_mask",
                f"the mask of {mask_HW.shape[1]} x {mask_HW.shape[0]} pixels does not fit the image of "
                f"{image_HWC.shape[1]} x {image_HWC.shape[0]}",
            )
        image_CHW = torch.tensor(image_HWC).permute(2, 0, 1).contiguous()
        labels_HW = None if mask_HW is None else torch.from_numpy(mask_HW.astype(np.int32) + 1)
        view_CHW, labels_HW = self.apply_tensors(image_CHW, labels_HW, image_id=image_id, view=view)
        view_HWC: NDArray[np.uint8] = view_CHW.permute(1, 2, 0).contiguous().numpy()
        if labels_HW is None:
            return view_HWC, None
        assert mask_HW is not None
        moved_HW = labels_HW.numpy() - 1
        return view_HWC, np.where(moved_HW < 0, unlabelled(mask_HW), moved_HW).astype(mask_HW.dtype)

    def apply_tensors(
        self, image_CHW: torch.Tensor, map_HW: torch.Tensor | None = None, *, image_id: str, view: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same on tensors: what training uses.

        Args:
            image_CHW: RGB (3, H, W), uint8 or float32 in [0, 1].
            map_HW: integers that move with the image by nearest neighbour, with 0 for what lies outside.
            image_id: seeds the view, together with its number and the policy's seed.
            view: number of the view.

        Raises:
            AugmentError: a transform cannot be applied to this image.
        """
        import torch
        from torchvision import tv_tensors

        transform = self._transform  # built outside of the lock
        image = tv_tensors.Image(image_CHW)
        inputs = (image,) if map_HW is None else (image, tv_tensors.Mask(map_HW))
        try:
            with _seeded(_seed(self.seed, image_id, view), image_CHW.device):
                outputs = transform(*inputs)
        except (ValueError, TypeError, RuntimeError, IndexError, AssertionError) as error:
            size = f"{image_CHW.shape[2]} x {image_CHW.shape[1]}"
            raise AugmentError(
                "not_augmented",
                f"augmentation {self.name!r} cannot be applied to an image of {size} pixels: {_one_line(error)}",
            ) from error
        view_CHW, moved = (outputs, None) if map_HW is None else outputs
        if view_CHW.shape[0] != 3:
            raise AugmentError("not_augmented", f"augmentation {self.name!r} left {view_CHW.shape[0]} channels, not 3")
        return view_CHW.as_subclass(torch.Tensor), None if moved is None else moved.as_subclass(torch.Tensor)

    def views(
        self, images_NHWC: NDArray[np.uint8], image_ids: Sequence[str], num_views: int, *, maps: bool = False
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int32] | None]]:
        """View after view of a batch: the images themselves, then ``num_views - 1`` augmented ones, of the same shape.

        A view that a transform gave another size is resized to the images' size.

        Args:
            images_NHWC: uint8 (N, H, W, 3).
            image_ids: N ids.
            num_views: the images themselves included.
            maps: also give the map of every view, (N, H, W): what ``carry_back`` needs.

        Raises:
            AugmentError: a transform cannot be applied to images of this size.
        """
        import torch

        num, height, width = images_NHWC.shape[:3]
        own_HW = torch.arange(1, height * width + 1, dtype=torch.int32).reshape(height, width)
        yield images_NHWC, np.broadcast_to(own_HW.numpy(), (num, height, width)) if maps else None
        for view in range(1, num_views):
            views_NHWC = np.empty_like(images_NHWC)
            maps_NHW = np.empty((num, height, width), dtype=np.int32) if maps else None
            for row, image_id in enumerate(image_ids):
                image_CHW = torch.tensor(images_NHWC[row]).permute(2, 0, 1).contiguous()  # also of read-only pixels
                moved_CHW, moved_HW = self.apply_tensors(
                    image_CHW, own_HW if maps else None, image_id=image_id, view=view
                )
                moved_CHW, moved_HW = _resized(moved_CHW, moved_HW, height, width)
                views_NHWC[row] = moved_CHW.permute(1, 2, 0).numpy()
                if maps_NHW is not None and moved_HW is not None:
                    maps_NHW[row] = moved_HW.numpy()
            yield views_NHWC, maps_NHW

    @cached_property
    def _transform(self) -> v2.Transform:
        from torchvision.transforms import v2

        built = _build_all(self.transforms, f"augmentation {self.name!r}")
        return built[0] if len(built) == 1 else v2.Compose(built)


def copy_name(parent: str, policy: Policy, copy: int, extension: str) -> str:
    """Name of copy 1, 2, … of an image under the destination: always the same, so that it is written once.

    Args:
        parent: image_id of the original.
        policy: what the copy is made by.
        copy: its number, which is the number of the view.
        extension: ``png`` or ``jpg``.
    """
    return f"{parent[:2]}/{parent}-{policy.digest}-{copy}.{extension}"


def carry_back(values_CHW: torch.Tensor, map_HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a view says, at the places of the original: sums (C, H, W) and how many pixels say something (H, W).

    Any geometric transform will do: each pixel of the view is added to the pixel that it shows. Sums over views divided
    by counts over views are the mean; a pixel that no view shows has count 0 (view 0 shows them all).

    Args:
        values_CHW: float, per pixel of the view, such as probabilities.
        map_HW: of ``views``.
    """
    import torch

    places_P = map_HW.reshape(-1).to(values_CHW.device, torch.int64)
    size = places_P.numel()
    # Place 0 takes what comes from outside, and is cut off.
    sums_CP = values_CHW.new_zeros((values_CHW.shape[0], size + 1)).index_add_(1, places_P, values_CHW.flatten(1))
    counts_P = values_CHW.new_zeros(size + 1).index_add_(0, places_P, values_CHW.new_ones(size))
    return sums_CP[:, 1:].reshape(values_CHW.shape), counts_P[1:].reshape(map_HW.shape)


# ------------------------------------------------------------------------------------------------------------- seeding


def _seed(seed: int, image_id: str, view: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{image_id}\0{view}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch for the block; afterwards they are as they were.

    Another thread that draws from them without this lock would still disturb both.
    """
    import torch

    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    with _lock:
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(seed)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _resized(
    image_CHW: torch.Tensor, map_HW: torch.Tensor | None, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if tuple(image_CHW.shape[1:]) == (height, width):
        return image_CHW, map_HW
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    moved_HW = None if map_HW is None else F.resize(map_HW[None], [height, width], InterpolationMode.NEAREST)[0]
    return F.resize(image_CHW, [height, width], antialias=True), moved_HW


# ------------------------------------------------------------------------------------------------------------ building


def _names(transforms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names of all transforms, also of those inside others."""
    for transform in transforms:
        yield transform["name"]
        yield from _names(transform.get("transforms", ()))


def _build_all(transforms: Sequence[Mapping[str, Any]], where: str) -> list[v2.Transform]:
    return [_build(transform, f"{where}, transform {number}") for number, transform in enumerate(transforms, start=1)]


def _build(entry: Mapping[str, Any], where: str) -> v2.Transform:
    """One transform of torchvision.

    Raises:
        CallError: unknown name, or wrong parameters.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    name = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(name, str):
        raise CallError(f'{where} needs a name, such as {{ name = "RandomHorizontalFlip" }}; it is {entry!r}')
    if name not in TRANSFORMS:
        raise CallError(f"{where}: {_why_not(name)}")
    where = f"{where} ({name})"
    kind = getattr(v2, name)
    parameters = inspect.signature(kind).parameters
    known = [parameter for parameter in parameters if parameter != "inplace"]  # the image is the caller's
    given = {key: _tuples(value) for key, value in entry.items() if key != "name"}
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"valid: {', '.join(known) or 'none'}"
            raise CallError(f"{where} has no parameter {key!r}; {hint}")
    missing = [key for key in known if parameters[key].default is inspect.Parameter.empty and key not in given]
    if missing and missing != ["transforms"]:
        raise CallError(f"{where} needs {' and '.join(missing)}; its parameters are {', '.join(known)}")
    if "transforms" in known:
        inner = entry.get("transforms")
        if not isinstance(inner, list | tuple) or not inner:
            raise CallError(f'{where} needs transforms = [{{ name = "…" }}, …] to choose from or to apply')
        given["transforms"] = _build_all(inner, where)
        _check_chances(given, where)
    if "interpolation" in given:
        if given["interpolation"] not in _INTERPOLATIONS:
            raise CallError(
                f"{where}: interpolation {given['interpolation']!r} is unknown; choose {', '.join(_INTERPOLATIONS)}"
            )
        given["interpolation"] = v2.InterpolationMode(given["interpolation"])
    if name == "AutoAugment" and "policy" in given:
        policies = [policy.value for policy in v2.AutoAugmentPolicy]
        if given["policy"] not in policies:
            raise CallError(f"{where}: policy {given['policy']!r} is unknown; choose {', '.join(policies)}")
        given["policy"] = v2.AutoAugmentPolicy(given["policy"])
    if "fill" in given:  # a colour is for images; what is outside of a mask or map is 0
        given["fill"] = {tv_tensors.Image: given["fill"], tv_tensors.Mask: 0}
    if name == "RandomErasing" and given.get("value") == "random":
        raise CallError(f"{where}: value = 'random' is for normalised images; give a number or three, from 0 to 255")
    if name == "Grayscale" and given.setdefault("num_output_channels", 3) != 3:
        raise CallError(f"{where}: num_output_channels must be 3; images stay RGB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # torchvision only warns of scale = (max, min)
            transform = kind(**given)
        if name not in _CONTAINERS:
            _try_out(transform)
    except (
        UserWarning,
        TypeError,
        ValueError,
        RuntimeError,
        IndexError,
        KeyError,
        AttributeError,
        AssertionError,
    ) as error:
        raise CallError(f"{where}: {_one_line(error)}") from None
    if name == "RandomErasing":  # it leaves masks alone; without this it warns about every one
        transform._transformed_types = (tv_tensors.Image,)
    return transform


def _why_not(name: str) -> str:
    for reason, names in _REFUSED.items():
        if name in names:
            return f"{name} cannot be part of a policy: {reason}"
    close = difflib.get_close_matches(name, TRANSFORMS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose of {', '.join(sorted(TRANSFORMS))}"
    return f"{name!r} is no transform for images in torchvision.transforms.v2; {hint}"


def _check_chances(given: Mapping[str, Any], where: str) -> None:
    chances = given.get("p")
    if isinstance(chances, tuple) and len(chances) != len(given["transforms"]):
        raise CallError(f"{where}: p has {len(chances)} numbers for {len(given['transforms'])} transforms")


def _try_out(transform: v2.Transform) -> None:
    """Apply a transform once to a small image: some parameters are looked at only then.

    Raises:
        Exception: what torchvision says of them.
    """
    import torch
    from torchvision import tv_tensors

    image = tv_tensors.Image(torch.zeros((3, 64, 64), dtype=torch.uint8))
    with _seeded(0, torch.device("cpu")):
        chance = getattr(transform, "p", None)
        if isinstance(chance, int | float):
            transform.p = 1.0
        try:
            transform(image)
        except (ValueError, RuntimeError) as error:
            if not any(word in str(error) for word in ("larger than", "should be less than", "should be smaller")):
                raise  # a crop or padding that is too much for the small image may fit the real ones
        finally:
            if isinstance(chance, int | float):
                transform.p = chance


def _tuples(value: Any) -> Any:
    """Lists of TOML as tuples, all the way down."""
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list | tuple) else value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
