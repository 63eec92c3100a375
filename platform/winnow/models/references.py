"""From a model reference in winnow.toml to exact weights: which file, with which hash, and how to use it.

``resolve_cached`` answers from a small JSON file the second time, without importing torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from winnow.config import Kind, TaskConfig
from winnow.errors import CallError, ImageError
from winnow.images import View
from winnow.models.architectures import (
    Preset,
    Triple,
    check_buildable,
    find_preset,
    find_segmentation_preset,
    is_segmenter,
    segmentation_view,
)
from winnow.models.cards import Card, Head
from winnow.models.checkpoints import SUFFIXES, is_two_parts, linear_head_in, read_state_dict, sha256_of
from winnow.models.downloads import hub_file

logger = logging.getLogger(__name__)

Fetch = Callable[[str], "bytes | Path"]
"""Reads a URL: its bytes, or a local file that holds them."""

Output = Literal["logits", "features", "masks", "maps"]

OUTPUTS: dict[Kind, Output] = {"classification": "logits", "segmentation": "masks", "embedding": "features"}
"""What a model of each kind of task gives."""

PYRAMID_SIZE = 512
"""Side of the square into which images are fitted for masks made from feature maps, unless the task says another."""

_CACHE_FORMAT = 3
"""Raised when what a reference resolves to changes its meaning; older cache files are then ignored."""

_SECRET_QUERY = re.compile(r"(?i)(sig|signature|token|key|credential|password)[^=&]*=")


@dataclass(frozen=True)
class ResolvedModel:
    """Exact weights and how to use them. Travels to workers as JSON.

    Attributes:
        id: value of the column ``model``: ``torchvision/NAME@WEIGHTS``, ``timm/NAME.TAG``, or ``FILE#HASH`` with the
            first 12 digits of a checkpoint's SHA-256; with ``~cropSHARE`` where the task sets ``crop``.
        source: ``torchvision``, ``timm``, ``checkpoint``, or ``registry`` for a trained version.
        architecture: ``torchvision/NAME`` or ``timm/NAME``.
        weights: name of torchvision's weights, timm's tag, or the checkpoint's file name.
        location: URL, ``hf://REPOSITORY@COMMIT/FILE``, or absolute path of a checkpoint.
        sha256: of the weights file, hex; torchvision publishes the first digits only.
        classes: names of the outputs, distinct, in order; empty for features and maps.
        view: which pixels the network sees.
        mean, std: normalisation of pixels in [0, 1], by channel R, G, B.
        output: ``logits`` of an image, its ``features``, ``masks``; or ``maps``, which only training starts from.
        head: of a file of two parts, backbone and head: ``linear``, ``rms_linear`` or ``pyramid``; empty for a whole
            network.
        temperature: by which logits are divided before softmax (Guo et al. 2017).
        multi_label: an image may have several classes: each logit is about one of them.
    """

    id: str
    source: str
    architecture: str
    weights: str
    location: str
    sha256: str
    classes: tuple[str, ...]
    view: View
    mean: Triple
    std: Triple
    output: Output = "logits"
    head: Head = ""
    temperature: float = 1.0
    multi_label: bool = False

    @property
    def reference(self) -> str:
        """The full name of weights that a library publishes: the id without what the task sees of an image."""
        return self.id.partition("~")[0]

    def to_json(self) -> str:
        """One line of JSON that ``from_json`` reads."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The model that ``to_json`` wrote.

        Raises:
            ValueError: the text is something else.
        """
        data = json.loads(text)
        try:
            return cls(
                **{
                    **data,
                    "classes": tuple(data["classes"]),
                    "mean": tuple(data["mean"]),
                    "std": tuple(data["std"]),
                    "view": View.from_dict(data["view"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a resolved model: {error!r}") from None


def resolve(task: TaskConfig, *, base_dir: Path, fetch: Fetch | None = None) -> ResolvedModel:
    """Find the weights of a task's model, and check that they can be used.

    A checkpoint is read and compared with its architecture; a timm model's file is downloaded for its hash; of a
    torchvision model nothing is downloaded, for its hash is published.

    Args:
        task: its ``model``, ``architecture`` and ``classes`` count.
        base_dir: where relative paths start: the folder of winnow.toml.
        fetch: reads checkpoints given by URL.

    Raises:
        CallError: unknown model, weights or scheme; not a classifier; a checkpoint that is not safe, is damaged or does
            not fit; a wrong number of classes. The message says what is valid.
        JobError: weights have to be downloaded and cannot be.
    """
    preset = _published_preset(task)
    if preset is None:
        found = _resolve_checkpoint(task, base_dir, fetch)
    elif task.kind == "embedding":
        _check_no_classes(task)
        found = _resolved(preset, "features", ())
    elif preset.num_classes == 0:
        raise CallError(f"{preset.reference} is not a classifier: its weights have no classes; choose another model")
    else:
        found = _resolved(preset, "masks" if task.kind == "segmentation" else "logits", _classes(preset, task))
    return found if task.crop is None else _cropped(found, task.crop)


def _cropped(model: ResolvedModel, share: float) -> ResolvedModel:
    """A model that sees more or less of each image than its weights' own transform shows it: another answerer."""
    view = model.view
    if view.crop is None or view.crop[0] != view.crop[1]:
        raise CallError(f"crop = {share:g} is for models that see a square cut out of the image; {model.id} sees all")
    resize = math.floor(view.crop[0] / share + 0.5)
    return dataclasses.replace(model, id=f"{model.id}~crop{share:g}", view=dataclasses.replace(view, resize=resize))


def resolve_backbone(task: TaskConfig, *, base_dir: Path, fetch: Fetch | None = None) -> ResolvedModel:
    """What training a head on frozen features starts from: the task's model without its own head.

    Features of an image for classification, maps of features for segmentation. A checkpoint needs its architecture;
    its classes do not count.

    Raises:
        CallError, JobError: as ``resolve``; or the model is a segmentation network, which has no features of its own.
    """
    if is_segmenter(task.model) or is_segmenter(task.architecture or ""):
        raise CallError(
            f"{task.model} is a whole segmentation network; a head is trained on the features of a classifier such as "
            "torchvision/mobilenet_v2 or timm/resnet18"
        )
    plain = task.model_copy(update={"kind": "embedding", "classes": None, "size": None})
    found = dataclasses.replace(resolve(plain, base_dir=base_dir, fetch=fetch), head="")
    if task.kind != "segmentation":
        return found
    view = segmentation_view(found.mean, task.size or PYRAMID_SIZE)
    return dataclasses.replace(found, output="maps", view=view)


def _published_preset(task: TaskConfig) -> Preset | None:
    """Weights that a library publishes; None for a checkpoint.

    Raises:
        CallError: no such model, or not one for this kind of task.
    """
    if task.kind != "segmentation" and task.size is not None:
        raise CallError(
            f"size = {task.size} is for segmentation only; a {task.kind} model sees the size of its weights"
        )
    if task.model.partition("/")[0] not in ("torchvision", "timm"):
        return None
    if task.architecture is not None:
        raise CallError(f"architecture = {task.architecture!r} is for checkpoints only; {task.model!r} says it already")
    if task.kind == "segmentation":
        if is_segmenter(task.model):
            preset = find_segmentation_preset(task.model, task.size)
        else:
            reference = find_preset(task.model).reference
            raise CallError(
                f"{reference} has no decoder for masks yet; train one with `winnow train TASK --head` and promote it, "
                "or choose a segmentation network such as torchvision/lraspp_mobilenet_v3_large"
            )
    else:
        preset = find_preset(task.model)
    if not (preset.url or preset.hub_id):
        raise CallError(f"{preset.reference} has no published weights; give a checkpoint, and this as its architecture")
    return preset


def _resolved(preset: Preset, output: Output, classes: tuple[str, ...]) -> ResolvedModel:
    location, sha256 = preset.url, preset.sha256
    if preset.hub_id:
        path = hub_file(preset.hub_id, "", "", preset.reference)
        commit = path.parent.name if path.parent.parent.name == "snapshots" else "main"
        location, sha256 = f"hf://{preset.hub_id}@{commit}/{path.name}", sha256_of(path)
    return ResolvedModel(
        id=preset.reference,
        source=preset.architecture.partition("/")[0],
        architecture=preset.architecture,
        weights=preset.weights,
        location=location,
        sha256=sha256,
        classes=classes,
        view=preset.view,
        mean=preset.mean,
        std=preset.std,
        output=output,
    )


def resolve_card(card: Card, location: str) -> ResolvedModel:
    """A model version of the registry, whose weights lie at a URI."""
    return ResolvedModel(
        id=card.version,
        source="registry",
        architecture=card.architecture,
        weights=location.rsplit("/", 1)[-1],
        location=location,
        sha256=card.sha256,
        classes=card.classes,
        view=card.view,
        mean=card.mean,
        std=card.std,
        output=OUTPUTS[card.kind],
        head=card.head,
        temperature=card.temperature,
        multi_label=card.multi_label,
    )


def _check_no_classes(task: TaskConfig) -> None:
    if task.classes is not None:
        raise CallError("an embedding has no classes; leave them out")


def _classes(preset: Preset, task: TaskConfig) -> tuple[str, ...]:
    """The task's names, else the preset's."""
    if task.classes is None:
        if not preset.classes:
            raise CallError(f"the names of {preset.reference}'s {preset.num_classes} classes are unknown; give classes")
        return preset.classes
    if len(task.classes) != preset.num_classes:
        raise CallError(
            f"{len(task.classes)} classes are given, but {preset.reference} has {preset.num_classes} outputs; give as "
            "many names, leave classes out, or train a head for your classes with `winnow train TASK --head`"
        )
    return task.classes


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _resolve_checkpoint(task: TaskConfig, base_dir: Path, fetch: Fetch | None) -> ResolvedModel:
    location, name = checkpoint_location(task.model, base_dir)
    needed = ("architecture",) if task.kind == "embedding" else ("architecture", "classes")
    lacking = [key for key in needed if getattr(task, key) is None]
    if task.architecture is None or lacking:
        meaning = {
            "architecture": "architecture (torchvision/NAME or timm/NAME)",
            "classes": "classes (names in the order of its outputs)",
        }
        raise CallError(
            f"the checkpoint {task.model!r} lacks {' and '.join(lacking)}; give "
            f"{' and '.join(meaning[key] for key in lacking)}"
        )
    if task.kind == "embedding":
        _check_no_classes(task)
    whole = task.kind == "segmentation" and is_segmenter(task.architecture)
    preset = find_segmentation_preset(task.architecture, task.size) if whole else find_preset(task.architecture)
    check_buildable(preset.architecture)
    source = read_checkpoint(location, fetch)
    state = read_state_dict(source, name)
    head: Head = ""
    view = preset.view
    if is_two_parts(state):
        head = "pyramid" if task.kind == "segmentation" else linear_head_in(state)
        if task.kind == "segmentation":
            view = segmentation_view(preset.mean, task.size or PYRAMID_SIZE)
    sha256 = sha256_of(source)
    resolved = ResolvedModel(
        id=f"{name}#{sha256[:12]}",
        source="checkpoint",
        architecture=preset.architecture,
        weights=name,
        location=location,
        sha256=sha256,
        classes=task.classes or (),
        view=view,
        mean=preset.mean,
        std=preset.std,
        output=OUTPUTS[task.kind],
        head=head,
    )
    from winnow.models.assembly import assemble

    assemble(resolved, state)  # raises when they do not fit
    return resolved


def checkpoint_location(model: str, base_dir: Path) -> tuple[str, str]:
    """URL or absolute path of a checkpoint, and its file name.

    Raises:
        CallError: the reference is no checkpoint's, or the URL holds credentials.
    """
    url = urlsplit(model) if "://" in model else None
    name = (url.path if url else model).replace("\\", "/").rsplit("/", 1)[-1]
    if not name.endswith(SUFFIXES):
        raise CallError(
            f"model {model!r} is unknown; write torchvision/NAME[@WEIGHTS], timm/NAME[.TAG], or the path or URL of a "
            f"checkpoint ({', '.join(SUFFIXES)})"
        )
    if url is None:
        return str((base_dir / Path(model).expanduser()).resolve()), name
    if url.username or url.password or _SECRET_QUERY.search(url.query):
        raise CallError(f"the URL of {name} holds credentials, which tables would show; take them from the environment")
    return model, name


def read_checkpoint(location: str, fetch: Fetch | None) -> Path | bytes:
    """The file of a checkpoint, or its bytes.

    Raises:
        CallError: it is not there.
    """
    if "://" in location:
        if fetch is None:
            raise CallError(f"{location} cannot be read: nothing here reads URLs")
        try:
            return fetch(location)
        except ImageError as error:
            raise CallError(f"the checkpoint {location} cannot be read: {error}") from None
    path = Path(location)
    if not path.is_file():
        raise CallError(f"the checkpoint {path} does not exist, or not on this machine; paths start at winnow.toml")
    return path


# ----------------------------------------------------------------------------------------------------------- the cache


def resolve_cached(
    task: TaskConfig,
    *,
    cache_dir: Path,
    base_dir: Path,
    fetch: Fetch | None = None,
    version: Callable[[str], str] | None = None,
) -> ResolvedModel:
    """As ``resolve``, but answered from a file, without importing torch, when nothing has changed.

    What counts is the reference, architecture, classes, the installed libraries, and of a checkpoint its size and time
    (a path) or ``version`` (a URL).

    Args:
        task: its ``model``, ``architecture`` and ``classes`` count.
        cache_dir: where the answers are kept; made when needed.
        base_dir: where relative paths start: the folder of winnow.toml.
        fetch: reads checkpoints given by URL.
        version: what identifies the content of a URL, such as its etag. Without it URLs are resolved every time.

    Raises:
        CallError: as ``resolve``.
        JobError: as ``resolve``.
    """
    stamp = _stamp(task, base_dir, version)
    if stamp is None:
        return resolve(task, base_dir=base_dir, fetch=fetch)
    key = [
        _CACHE_FORMAT,
        task.model,
        task.kind,
        task.architecture,
        task.classes,
        task.size,
        task.crop,
        _installed("torchvision"),
        _installed("timm"),
        stamp,
    ]
    path = cache_dir / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
    try:
        return ResolvedModel.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("ignoring %s: %s", path, error)
    resolved = resolve(task, base_dir=base_dir, fetch=fetch)
    try:
        _write(path, resolved.to_json())
    except OSError as error:
        logger.warning("the resolved model %s cannot be kept in %s: %s", resolved.id, cache_dir, error)
    return resolved


def _stamp(task: TaskConfig, base_dir: Path, version: Callable[[str], str] | None) -> Any:
    """What changes when the weights do; None when that cannot be told without reading them."""
    if task.model.partition("/")[0] in ("torchvision", "timm"):
        return ""
    location, _ = checkpoint_location(task.model, base_dir)
    if "://" in location:
        return [location, version(location)] if version is not None else None
    try:
        found = Path(location).stat()
    except OSError:
        return None
    return [location, found.st_size, found.st_mtime_ns]


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
