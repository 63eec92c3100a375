"""Networks from state dicts: build what an architecture says, compare keys and shapes, load."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from winnow.errors import CallError
from winnow.models.architectures import build, build_segmenter, find_preset, is_segmenter
from winnow.models.checkpoints import check_state_dict, is_two_parts
from winnow.models.networks import (
    Network,
    PyramidHead,
    RmsLinear,
    classifier_name,
    maps_of,
    pyramid_channels,
    split_classifier,
    without_classifier,
)
from winnow.models.references import ResolvedModel


def assemble(model: ResolvedModel, state: Mapping[str, Tensor]) -> Network:
    """The network of a checkpoint's or version's weights, in evaluation mode.

    Args:
        model: whose file it is.
        state: the file's tensors: a whole network's, or those of backbone and head (``networks.state_of``).

    Raises:
        CallError: the weights do not fit; the message names the first keys.
    """
    size, num_classes, name = model.view.size, len(model.classes), model.weights
    assert size is not None
    if is_two_parts(state) or model.head:
        return _two_parts(model, state, size).eval()
    if is_segmenter(model.architecture):
        segmenter = build_segmenter(model.architecture, num_classes)
        own = {key: tensor for key, tensor in state.items() if not key.startswith("aux_classifier.")}  # for training
        _load(segmenter.network, own, name, num_classes)
        return Network(segmenter).eval()
    if model.output == "masks":
        raise CallError(
            f"{name} holds a whole classifier; masks need a segmentation network as architecture, or the weights of a "
            "version that `winnow train TASK --head` made"
        )
    if model.output != "logits":
        num_classes = _num_outputs(model.architecture, state)
    network = build(model.architecture, num_classes)
    _load(network, state, name, num_classes)
    return take_apart(network.eval(), model, num_classes)


def take_apart(network: nn.Module, model: ResolvedModel, num_classes: int) -> Network:
    """What a model needs of a loaded classifier, which must not be used afterwards: all of it, or its features.

    Raises:
        CallError: it gives no such features.
    """
    size = model.view.size
    assert size is not None
    if model.output == "logits":
        return split_classifier(network, num_classes, size)
    if model.output == "maps":
        return Network(maps_of(network, num_classes, model.architecture)).eval()
    return Network(without_classifier(network, num_classes, size, model.architecture))


def _two_parts(model: ResolvedModel, state: Mapping[str, Tensor], size: tuple[int, int]) -> Network:
    """Backbone and head, each compared with its part of the file."""
    num_known = find_preset(model.architecture).num_classes or 1000
    network = build(model.architecture, num_known).eval()
    head: nn.Module | None = None
    if model.output in ("masks", "maps"):
        backbone = maps_of(network, num_known, model.architecture).eval()
        if model.output == "masks":
            head = PyramidHead(pyramid_channels(backbone, size), len(model.classes))
    else:
        backbone = without_classifier(network, num_known, size, model.architecture)
        if model.output == "logits":
            normed = model.head == "rms_linear"
            weight = state.get("head.linear.weight" if normed else "head.weight")
            depth = weight.shape[-1] if weight is not None else 0
            head = (RmsLinear if normed else nn.Linear)(depth, len(model.classes))
    for part, module in (("backbone", backbone), ("head", head)):
        if module is not None:
            own = {key.partition(".")[2]: tensor for key, tensor in state.items() if key.startswith(f"{part}.")}
            _load(module, own, f"the {part} in {model.weights}", len(model.classes))
    return Network(backbone, head)


def _load(network: nn.Module, state: Mapping[str, Tensor], name: str, num_classes: int) -> None:
    check_state_dict(network, state, name, num_classes)
    try:
        network.load_state_dict(state, strict=False)
    except ValueError as error:  # MNASNet wants to know which version of itself was saved, which no state dict says
        raise CallError(f"{name} cannot be loaded: {error}; choose another architecture") from None


def _num_outputs(architecture: str, state: Mapping[str, Tensor]) -> int:
    """Outputs of the classifier in a file, whose classes nobody needs to know when only its features are used."""
    num_known = find_preset(architecture).num_classes or 1000
    name = classifier_name(build(architecture, num_known), num_known)
    weight = state.get(f"{name}.weight")
    if weight is not None and weight.ndim == 2:
        return int(weight.shape[0])
    return 0 if architecture.startswith("timm/") and name is not None else num_known  # a tower without a classifier
