"""From a resolved model to one that answers: fetch the weights, verify their hash, build, load.

Nothing is unpickled: torch.load runs with ``weights_only=True`` everywhere, torchvision's own loader included.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.config import Precision
from winnow.errors import JobError
from winnow.models.architectures import find_preset, torchvision_weights
from winnow.models.checkpoints import read_state_dict, sha256_of
from winnow.models.downloads import hub_file, torch_hub_file
from winnow.models.references import Fetch, ResolvedModel, read_checkpoint

if TYPE_CHECKING:
    from torch import nn

    from winnow.models.networks import Network
    from winnow.models.predictors import Predictor

logger = logging.getLogger(__name__)

_HUB_LOCATION = re.compile(r"hf://(?P<repo>[^@]+)@(?P<commit>[^/]+)/(?P<file>.+)")


def load(
    model: ResolvedModel, *, device: str = "cpu", precision: Precision = "auto", fetch: Fetch | None = None
) -> Predictor:
    """One model, ready to answer on a device; its name in the predictor is its id. See ``load_all``."""
    (predictor,) = load_all({model.id: model}, device=device, precision=precision, fetch=fetch)
    return predictor


def load_all(
    models: Mapping[str, ResolvedModel],
    *,
    device: str = "cpu",
    precision: Precision = "auto",
    fetch: Fetch | None = None,
) -> list[Predictor]:
    """Models by name, ready to answer on a device; those that see the same pixels through one backbone share it.

    Args:
        models: what ``resolve`` found, by name.
        device: as torch names it: ``cpu``, ``cuda``, ``cuda:1``.
        precision: of the arithmetic; ``auto`` is float32.
        fetch: reads checkpoints given by URL.

    Raises:
        CallError: the device or precision is not available here, or a checkpoint cannot be used.
        JobError: the weights cannot be had, or are not those that were resolved.
    """
    from winnow.models.predictors import predictors_of

    loaded = {name: (model, load_network(model, fetch=fetch)) for name, model in models.items()}
    return predictors_of(loaded, device=device, precision=precision)


def load_network(resolved: ResolvedModel, *, fetch: Fetch | None = None) -> Network:
    """The plain float32 network with its weights, on the CPU, in evaluation mode.

    Raises:
        CallError: a checkpoint cannot be used.
        JobError: the weights cannot be had, or are not those that were resolved.
    """
    from winnow.models.assembly import assemble, take_apart
    from winnow.models.networks import Network, Segmenter

    weights = obtain_weights(resolved, fetch=fetch)
    if resolved.source in ("checkpoint", "registry"):
        return assemble(resolved, read_state_dict(weights, resolved.weights))
    assert isinstance(weights, Path)
    try:
        with _weights_only():
            network = _load_published(resolved, weights).eval()
    except (RuntimeError, pickle.UnpicklingError, KeyError, OSError) as error:
        raise JobError(f"{weights} does not hold the weights of {resolved.id}: {error}") from None
    if resolved.output == "masks":
        return Network(Segmenter(network)).eval()
    return take_apart(network, resolved, find_preset(resolved.reference).num_classes)


def obtain_weights(resolved: ResolvedModel, *, fetch: Fetch | None = None) -> Path | bytes:
    """The weights file on this machine, downloaded if need be, with its hash verified.

    Raises:
        CallError: a checkpoint is not there.
        JobError: the file cannot be downloaded, is damaged, or has changed since it was resolved.
    """
    weights: Path | bytes
    if resolved.source in ("checkpoint", "registry"):
        weights = read_checkpoint(resolved.location, fetch)
    elif hub := _HUB_LOCATION.fullmatch(resolved.location):
        weights = hub_file(hub["repo"], hub["file"], hub["commit"], resolved.id)
    else:
        return torch_hub_file(resolved.location, resolved.sha256, resolved.id)
    found = sha256_of(weights)
    if found != resolved.sha256:
        raise JobError(
            f"{resolved.location} has changed: its SHA-256 starts with {found[:12]}, not {resolved.sha256[:12]} as "
            f"when {resolved.id} was resolved; start the job again"
        )
    return weights


def _load_published(resolved: ResolvedModel, path: Path) -> nn.Module:
    """Through the library's own loader, which knows what its weights need (renamed keys, auxiliary outputs)."""
    name = resolved.architecture.partition("/")[2]
    network: nn.Module
    if resolved.source == "torchvision":
        from torchvision.models import get_model

        network = get_model(name, weights=torchvision_weights(name, resolved.weights), progress=False)
        if resolved.output == "masks":
            setattr(network, "aux_classifier", None)  # noqa: B010  only training needs it
        return network
    import timm

    full = f"{name}.{resolved.weights}" if resolved.weights else name
    overlay = {"file": str(path), "custom_load": False}
    network = timm.create_model(full, pretrained=True, pretrained_cfg_overlay=overlay)
    return network


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """torch.load refuses everything but tensors, whatever its caller asks for: torchvision asks for less."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
