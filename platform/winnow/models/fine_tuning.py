"""Training whole networks: what is learned of them, one step, what to keep so that a training can go on after a kill.

Legend: N images of a batch, H × W pixels, C classes. Targets are class indices int64 (N,); where an image may have
several classes, float32 (N, C) of 0 and 1; for masks class ids (N, H, W) with -1 for "not labelled".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from winnow.augment import Policy
from winnow.config import AugmentationConfig, TrainConfig
from winnow.errors import JobError
from winnow.images import View
from winnow.models.networks import Network, PyramidHead, RmsLinear, pyramid_channels

Target = Literal["class", "classes", "mask"]
"""What is said of an image: one class, several, or one of every pixel."""

WARM_UP_SHARE = 0.05
"""Share of the steps in which the learning rate rises to its highest."""

CLIP = 5.0
"""Longest gradient, as its norm over all weights (Pascanu et al. 2013)."""

LAST_SHARE = 1 / 3
"""Of the blocks of a backbone, those at its end that ``unfreeze = "last"`` trains."""

_STANDARD = AugmentationConfig(
    transforms=(
        {"name": "RandomResizedCrop", "size": [0, 0], "scale": [0.5, 1.0], "ratio": [0.8, 1.25]},
        {"name": "RandomHorizontalFlip"},
        {"name": "ColorJitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2},
    )
)


def standard_augmentation(view: View, seed: int) -> Policy:
    """What training does to every image unless winnow.toml says otherwise: another crop, mirrored or not, other light.

    Args:
        view: that the network sees.
        seed: of the training.
    """
    assert view.size is not None
    crop, *others = _STANDARD.transforms
    section = AugmentationConfig(transforms=({**crop, "size": list(view.size)}, *others), seed=seed)
    return Policy.from_config("standard", section)


class Trainable(nn.Module):
    """Backbone and head as one module: uint8 pixels (N, 3, H, W) to logits (N, C), or (N, C, H, W) for masks.

    Batch normalisation keeps the statistics that the weights came with: those of small batches are worse, and the
    network computes in training what it will compute in use.

    Args:
        network: its two parts, on the CPU.
        mean, std: normalisation of pixels in [0, 1], by channel R, G, B.
        is_dense: answers of every pixel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, mean: Sequence[float], std: Sequence[float], *, is_dense: bool) -> None:
        super().__init__()
        assert network.head is not None
        self.backbone, self.head, self.is_dense = network.backbone, network.head, is_dense
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        images = (pixels.float() / 255.0 - self.mean) / self.std
        images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.head(self.backbone(images))
        if self.is_dense:
            return interpolate(logits, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
        return logits

    def train(self, mode: bool = True) -> Trainable:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and self._is_pretrained(module):
                module.eval()
        return self

    def _is_pretrained(self, module: nn.Module) -> bool:
        return all(module is not own for own in self.head.modules())

    def state(self) -> dict[str, Tensor]:
        """All weights as they stand in a version's file."""
        return {
            key: tensor.detach().cpu().contiguous().clone()
            for key, tensor in self.state_dict().items()
            if key.startswith(("backbone.", "head."))
        }


# -------------------------------------------------------------------------------------------------------- what to train


def with_head(network: Network, known: Sequence[str], classes: Sequence[str], view: View, target: Target) -> Network:
    """The network with a head for these classes: its own where it knows them all, else one with what it knows of them.

    Args:
        network: backbone, with or without a head.
        known: the classes of its head, in order.
        classes: that it shall answer.
        view: that it sees.
        target: what it shall answer of an image.
    """
    if network.head is not None and tuple(known) == tuple(classes):
        return network
    assert view.size is not None
    head: nn.Module
    last: nn.Linear | nn.Conv2d
    if target == "mask":
        head = PyramidHead(pyramid_channels(network.backbone, view.size), len(classes))
        last = head.classify
    else:
        with torch.inference_mode():
            depth = int(network.backbone.eval()(torch.zeros(1, 3, *view.size)).shape[1])
        if isinstance(network.head, RmsLinear):
            head = RmsLinear(depth, len(classes))
            last = head.linear
        else:
            head = last = nn.Linear(depth, len(classes))
        nn.init.zeros_(last.bias)
        nn.init.normal_(last.weight, std=0.01)
    if network.head is not None:
        old = network.head.state_dict()
        shared = [name for name in classes if name in known]
        ours = [list(classes).index(name) for name in shared]
        theirs = [list(known).index(name) for name in shared]
        state = head.state_dict()
        for key, tensor in old.items():
            if key in state and tensor.shape == state[key].shape:
                state[key] = tensor
        own = {id(tensor): name for name, tensor in head.named_parameters()}
        for part in (last.weight, last.bias):
            assert part is not None
            key = own[id(part)]
            grown = part.detach().clone()
            grown[ours] = old[key][theirs]
            state[key] = grown
        head.load_state_dict(state)
    return Network(network.backbone, head)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The parts of a network with weights, in order: those of its longest sequence one by one."""
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    if len(children) == 1:
        return blocks_of(children[0])
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return children or [module]
    blocks: list[nn.Module] = []
    for child in children:
        is_sequence = isinstance(child, nn.Sequential | nn.ModuleList)
        inner = [part for part in child.children() if any(True for _ in part.parameters())] if is_sequence else []
        blocks += inner or [child]
    return blocks or [module]


def freeze(model: Trainable, unfreeze: Literal["head", "last", "all"]) -> None:
    """Leave only the weights that are to be learned with gradients: the head's, and those of the backbone asked for."""
    model.requires_grad_(True)
    if unfreeze == "all":
        return
    model.backbone.requires_grad_(False)
    if unfreeze == "last":
        blocks = blocks_of(model.backbone)
        for block in blocks[-max(1, math.ceil(len(blocks) * LAST_SHARE)) :]:
            block.requires_grad_(True)


def make_optimiser(model: Trainable, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019): the head learns faster than the backbone; biases and norms do not decay."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("head."), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "highest": config.head_learning_rate if is_head else config.learning_rate,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (is_head, decays), parameters in groups.items()
        ],
        lr=config.learning_rate,
    )


def set_rate(optimiser: torch.optim.Optimizer, step: int, total: int, schedule: Literal["cosine", "constant"]) -> None:
    """Learning rates of a step: they rise to their highest, then stay, or fall along half a cosine to nothing."""
    warm = max(1, round(total * WARM_UP_SHARE))
    rate = min(1.0, (step + 1) / warm)
    if schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / total))
    for group in optimiser.param_groups:
        group["lr"] = group["highest"] * rate


# ---------------------------------------------------------------------------------------------------------- what counts


def class_weights(counts_C: NDArray[np.int64]) -> NDArray[np.float32]:
    """Weight of each class in the loss: inverse to its share, 1 in the mean over images; 0 of classes never seen.

    Args:
        counts_C: images, or pixels, of each class.
    """
    seen = counts_C > 0
    weights = np.divide(1.0, counts_C, out=np.zeros(len(counts_C)), where=seen)
    return np.asarray(weights * counts_C.sum() / max(1, int(seen.sum())), dtype=np.float32)


def order_of_epoch(
    num_images: int, epoch: int, *, seed: int, batch_size: int, weights_N: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """Which images an epoch looks at, in order: a multiple of the batch size; the last batch is filled from the front.

    Args:
        num_images: of the train split.
        epoch: its number from 0 on.
        seed: of the training.
        batch_size: images per step.
        weights_N: chances of the images, for balanced sampling with replacement; without it each comes once.
    """
    random = np.random.default_rng([seed, epoch])
    if weights_N is None:
        order = random.permutation(num_images)
    else:
        order = random.choice(num_images, size=num_images, p=weights_N / weights_N.sum())
    return np.resize(order, batch_size * math.ceil(num_images / batch_size))


def loss_sum(logits: Tensor, targets: Tensor, valid_N: Tensor, target: Target, weights_C: Tensor | None) -> Tensor:
    """Loss in nats, added up over images: cross-entropy of a class, mean over classes, or mean over labelled pixels.

    Args:
        logits: (N, C) or (N, C, H, W).
        targets: of ``target``, see above; masks as int64 with -1 for "not labelled".
        valid_N: bool; others do not count, because they could not be read.
        target: what is said of an image.
        weights_C: of each class; for several classes an image, of its presence.
    """
    logits = logits.float()
    if target == "class":
        losses_N = cross_entropy(logits, targets, weight=weights_C, reduction="none")
    elif target == "classes":
        losses_N = binary_cross_entropy_with_logits(logits, targets, pos_weight=weights_C, reduction="none").mean(dim=1)
    else:
        losses_NHW = cross_entropy(logits, targets, weight=weights_C, ignore_index=-1, reduction="none")
        known_N = (targets >= 0).sum(dim=(1, 2)).clamp(min=1)
        losses_N = losses_NHW.sum(dim=(1, 2)) / known_N
    return (losses_N * valid_N).sum()


# ---------------------------------------------------------------------------------------------------------- checkpoints


def pack_checkpoint(
    model: Trainable, optimiser: torch.optim.Optimizer, best: Mapping[str, Tensor], state: Any
) -> bytes:
    """Everything that a training needs to go on as if nothing had been: a safetensors file, so tensors and text only.

    Args:
        model: trained so far.
        optimiser: its moments.
        best: weights of the best epoch so far; may be empty.
        state: JSON-able.
    """
    from safetensors.torch import save

    tensors = {f"model.{key}": tensor for key, tensor in model.state().items()}
    tensors |= {f"best.{key}": tensor for key, tensor in best.items()}
    for number, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{key}": value.detach().cpu() for key, value in moments.items()}
    return save({key: tensor.contiguous() for key, tensor in tensors.items()}, metadata={"state": json.dumps(state)})


def unpack_checkpoint(data: bytes, model: Trainable, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """Put a training back where ``pack_checkpoint`` found it; gives the best weights and the state.

    Raises:
        JobError: the file is damaged, or of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        state = json.loads(header["__metadata__"]["state"])
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimiser": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = tensor
        model.load_state_dict(parts["model"], strict=True)
        saved = optimiser.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in parts["optimiser"].items():
            number, _, name = key.partition(".")
            moments.setdefault(int(number), {})[name] = tensor
        optimiser.load_state_dict({**saved, "state": moments})
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise JobError(
            f"a checkpoint of this training cannot be used: {error}; abandon the run and train again"
        ) from None
    return parts["best"], state
