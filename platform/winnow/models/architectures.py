"""What torchvision and timm know about their models: weights, classes, geometry, normalisation.

A *preset* is found by a reference ``torchvision/NAME[@WEIGHTS]`` or ``timm/NAME[.TAG]``. torch, torchvision and timm
are imported inside the functions that need them.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from winnow.errors import CallError
from winnow.images import Interpolation, View

if TYPE_CHECKING:
    from torch import nn

    from winnow.models.networks import Segmenter

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

_HASHED_NAME = re.compile(r"-([0-9a-f]{8,64})\.")
"""torch.hub's convention: the first digits of the file's SHA-256 stand in its name."""

_DOUBLY_NORMALISED = frozenset({"googlenet", "inception_v3"})
"""Their published weights need a second normalisation inside the network, which a state dict does not record."""


@dataclass(frozen=True)
class Preset:
    """What goes in and what comes out of an architecture with certain weights.

    Attributes:
        architecture: ``torchvision/NAME`` or ``timm/NAME``.
        weights: name of torchvision's weights or timm's tag; empty where there are none.
        url: where the weights lie; empty when ``hub_id`` says so or there are none.
        hub_id: repository on the Hugging Face hub; empty unless the weights lie there.
        sha256: first digits of the file's hash as published; empty when unknown.
        num_classes: outputs of the network with these weights.
        classes: names of the outputs; empty when unknown.
        view: which pixels the network sees.
        mean, std: normalisation of pixels in [0, 1], by channel R, G, B.
    """

    architecture: str
    weights: str
    url: str
    hub_id: str
    sha256: str
    num_classes: int
    classes: tuple[str, ...]
    view: View
    mean: Triple
    std: Triple

    @property
    def reference(self) -> str:
        """The full name, such as ``torchvision/resnet50@IMAGENET1K_V2`` or ``timm/resnet50.a1_in1k``."""
        separator = "@" if self.architecture.startswith("torchvision/") else "."
        return f"{self.architecture}{separator}{self.weights}" if self.weights else self.architecture


def find_preset(reference: str) -> Preset:
    """The preset of a reference to a classifier; the library's default weights where none are named.

    Raises:
        CallError: no such model or weights, or the model is not an image classifier.
    """
    library, _, name = reference.partition("/")
    if library == "torchvision" and name:
        return _torchvision_preset(*_split_weights(name))
    if library == "timm" and name:
        return _timm_preset(name)
    raise CallError(f"architecture {reference!r} is unknown; write torchvision/NAME or timm/NAME")


def is_segmenter(reference: str) -> bool:
    """True for a reference to one of torchvision's segmentation networks."""
    library, _, name = reference.partition("/")
    return library == "torchvision" and _split_weights(name)[0] in _segmenters()


def segmentation_view(mean: Triple, size: int) -> View:
    """Images fitted into a square; what they leave free has the mean colour, which is 0 after normalisation."""
    red, green, blue = (round(255 * value) for value in mean)
    return View(fit=(size, size), fill=(red, green, blue))


def find_segmentation_preset(reference: str, size: int | None) -> Preset:
    """The preset of one of torchvision's segmentation networks.

    Args:
        reference: ``torchvision/NAME[@WEIGHTS]``.
        size: side of the square that images are fitted into; that of torchvision's own transform by default.

    Raises:
        CallError: no such network or weights.
    """
    import torchvision.models
    from torchvision.transforms._presets import SemanticSegmentation

    name, weights = _split_weights(reference.partition("/")[2])
    if not is_segmenter(reference):
        raise CallError(f"{reference!r} is no segmentation network of torchvision; choose {', '.join(_segmenters())}")
    member = _weights_member(torchvision.models, name, weights)
    transforms = member.transforms()
    assert isinstance(transforms, SemanticSegmentation), type(transforms)
    classes = tuple(member.meta["categories"])
    found = _HASHED_NAME.search(member.url.rsplit("/", 1)[-1])
    mean = _triple(transforms.mean)
    return Preset(
        architecture=f"torchvision/{name}",
        weights=member.name,
        url=member.url,
        hub_id="",
        sha256=found.group(1) if found else "",
        num_classes=len(classes),
        classes=classes,
        view=segmentation_view(mean, size or int(transforms.resize_size[0])),
        mean=mean,
        std=_triple(transforms.std),
    )


def build_segmenter(architecture: str, num_classes: int) -> Segmenter:
    """One of torchvision's segmentation networks without weights, with that many classes."""
    from torchvision.models import get_model

    from winnow.models.networks import Segmenter

    name = architecture.partition("/")[2]
    return Segmenter(get_model(name, weights=None, weights_backbone=None, num_classes=num_classes))


def build(architecture: str, num_classes: int) -> nn.Module:
    """The classifier without weights, with that many outputs.

    Raises:
        CallError: the architecture cannot be built so.
    """
    library, _, name = architecture.partition("/")
    if library == "timm":
        timm = _import_timm()
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes)
        return network
    check_buildable(architecture)
    from torchvision.models import get_model

    built: nn.Module = get_model(name, weights=None, num_classes=num_classes)
    return built


def check_buildable(architecture: str) -> None:
    """Refuse architectures whose networks cannot be made from a state dict.

    Raises:
        CallError: it is one of these.
    """
    if architecture.removeprefix("torchvision/") in _DOUBLY_NORMALISED:
        raise CallError(
            f"a checkpoint of {architecture} cannot be used: whether its inputs are normalised a second time is not "
            f"part of a state dict; use the reference {architecture} itself, or timm/inception_v3"
        )


# --------------------------------------------------------------------------------------------------------- torchvision


def torchvision_weights(name: str, weights: str) -> Any:
    """The member of torchvision's weights enum, such as ``MobileNet_V2_Weights.IMAGENET1K_V1``."""
    from torchvision.models import get_model_weights

    return get_model_weights(name)[weights]


def _split_weights(name: str) -> tuple[str, str]:
    model, _, weights = name.partition("@")
    return model, weights or "DEFAULT"


def _torchvision_preset(name: str, weights: str) -> Preset:
    import torchvision.models
    from torchvision.transforms._presets import ImageClassification

    classifiers = torchvision.models.list_models(module=torchvision.models)
    if name not in classifiers:
        if name in _segmenters():
            raise CallError(f'torchvision/{name} answers with masks; give the task kind = "segmentation"')
        if name in torchvision.models.list_models():
            raise CallError(
                f"torchvision/{name} is not an image classifier that Winnow runs{_suggest(name, classifiers)}"
            )
        raise CallError(f"torchvision has no classifier named {name!r}{_suggest(name, classifiers)}")
    member = _weights_member(torchvision.models, name, weights)
    transforms = member.transforms()
    if not isinstance(transforms, ImageClassification):
        raise CallError(
            f"torchvision/{name}@{weights} is not an image classifier but made for {type(transforms).__name__}"
        )
    classes = tuple(member.meta.get("categories") or ())
    found = _HASHED_NAME.search(member.url.rsplit("/", 1)[-1])
    return Preset(
        architecture=f"torchvision/{name}",
        weights=member.name,
        url=member.url,
        hub_id="",
        sha256=found.group(1) if found else "",
        num_classes=len(classes),
        classes=_distinct(classes),
        view=View(
            resize=_square(transforms.resize_size),
            crop=_pair(transforms.crop_size),
            interpolation=_interpolation(transforms.interpolation.value, f"torchvision/{name}"),
        ),
        mean=_triple(transforms.mean),
        std=_triple(transforms.std),
    )


def _weights_member(models: Any, name: str, weights: str) -> Any:
    known = models.get_model_weights(name)
    if weights not in known.__members__:
        raise CallError(
            f"torchvision/{name} has no weights named {weights!r}; choose {', '.join(w.name for w in known)} or leave "
            "@WEIGHTS out for the default"
        )
    return known[weights]


def _segmenters() -> list[str]:
    import torchvision.models

    names: list[str] = torchvision.models.list_models(module=torchvision.models.segmentation)
    return names


def _square(size: Sequence[int]) -> int | tuple[int, int]:
    """The ``resize_size`` of torchvision: one number is the shorter side."""
    return size[0] if len(size) == 1 else (size[0], size[1])


def _pair(size: Sequence[int]) -> tuple[int, int]:
    return (size[0], size[0]) if len(size) == 1 else (size[0], size[1])


# ---------------------------------------------------------------------------------------------------------------- timm


def _import_timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError:
        raise CallError(
            "models of timm need a package that is not installed; run: pip install 'winnow-vision[timm]'"
        ) from None
    return timm


def _timm_preset(name: str) -> Preset:
    timm = _import_timm()
    base = name.split(".", 1)[0]
    if not timm.is_model(base):
        raise CallError(f"timm has no model named {base!r}{_suggest(base, timm.list_models())}")
    reference = f"timm/{name}"
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = ", ".join(full.split(".", 1)[1] for full in timm.list_pretrained(f"{base}.*")) or "none"
        raise CallError(f"{reference}: timm has no such weights; tags of {base}: {tags}") from None
    settings: dict[str, Any] = config.to_dict() if config is not None else {}
    data = timm.data.resolve_data_config(pretrained_cfg=settings)
    channels, height, width = data["input_size"]
    if channels != 3:
        raise CallError(f"{reference} takes images of {channels} channels; Winnow gives 3 (RGB)")
    num_classes = int(settings.get("num_classes", 0))
    hub_id = str(settings.get("hf_hub_id") or "")
    url = "" if hub_id else str(settings.get("url") or "")
    found = _HASHED_NAME.search(url.rsplit("/", 1)[-1])
    return Preset(
        architecture=f"timm/{base}",
        weights=str(settings.get("tag") or ""),
        url=url,
        hub_id=hub_id,
        sha256=found.group(1) if found else "",
        num_classes=num_classes,
        classes=_imagenet_names(num_classes),
        view=_timm_view(data, height, width, reference),
        mean=_triple(data["mean"]),
        std=_triple(data["std"]),
    )


def _timm_view(data: dict[str, Any], height: int, width: int, reference: str) -> View:
    """The geometry of ``timm.data.create_transform`` in evaluation (``transforms_imagenet_eval``)."""
    grown = math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"])
    mode = data["crop_mode"]
    resize: int | tuple[int, int]
    if mode == "squash":
        resize = grown
    elif mode == "center" and height == width:
        resize = grown[0]
    else:
        raise CallError(
            f"{reference} crops {height} x {width} in mode {mode!r}; Winnow knows squash, and center for squares"
        )
    return View(resize=resize, crop=(height, width), interpolation=_interpolation(data["interpolation"], reference))


def _imagenet_names(num_classes: int) -> tuple[str, ...]:
    """Names of an ImageNet subset with that many classes; empty when there is none."""
    timm = _import_timm()
    subset = timm.data.infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return ()
    info = timm.data.ImageNetInfo(subset)
    return _distinct(info.label_descriptions(), info.label_names())


# -------------------------------------------------------------------------------------------------------------- shared


def _distinct(names: Sequence[str], extra: Sequence[str] | None = None) -> tuple[str, ...]:
    """The names; those that stand more than once get ``extra`` (else their index) in brackets behind them."""
    counts = Counter(names)
    marks = extra if extra is not None else [str(index) for index in range(len(names))]
    return tuple(f"{name} ({mark})" if counts[name] > 1 else name for name, mark in zip(names, marks, strict=True))


def _interpolation(name: str, reference: str) -> Interpolation:
    for known in get_args(Interpolation):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise CallError(f"{reference} resizes by {name!r}; known are {', '.join(get_args(Interpolation))}")


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
