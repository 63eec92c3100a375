"""A light decoder on frozen feature maps, trained on label maps in minutes on a CPU.

Legend: N images, C classes, D channels; maps from fine to coarse (N, D, h, w); targets (N, H, W), class ids, where the
largest value of their type means "not labelled".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from winnow.errors import JobError
from winnow.masks import LabelMap, label_dtype, resize_to_source
from winnow.models.networks import PyramidHead

logger = logging.getLogger(__name__)

Maps = Sequence[NDArray[np.float16]]

BATCH = 8
"""Images per step."""

IMAGES_SEEN = 4_000
"""Times that any image is looked at, over all epochs, as far as ``MOST_EPOCHS`` allows; at least every image twice."""

MOST_EPOCHS = 40
RATE = 2e-3
DECAY = 1e-4
"""AdamW's learning rate at its highest, and weight decay (Loshchilov & Hutter 2019)."""


def num_steps(num_images: int) -> int:
    """Steps of a training on so many images."""
    epochs = min(MOST_EPOCHS, max(2, math.ceil(IMAGES_SEEN / num_images)))
    return epochs * math.ceil(num_images / BATCH)


def fit_pyramid_head(
    maps: Maps,
    targets_NHW: NDArray[Any],
    num_classes: int,
    *,
    seed: int,
    device: str = "cpu",
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> PyramidHead:
    """The decoder after a fixed number of steps, on the CPU, in evaluation mode.

    Mean cross-entropy over labelled pixels, half of the images mirrored; the rate rises for a twentieth of the steps
    and falls along a cosine to nothing. The same seed, maps and number of threads give the same weights.

    Args:
        maps: of each stride, float16 (N, D, h, w); may be mapped files.
        targets_NHW: class ids of the type ``masks.label_dtype``; logits are enlarged to their size. May be a mapped
            file.
        num_classes: C.
        seed: of first weights, order and mirroring.
        device: as torch names it.
        on_step: told how many steps are done, and of how many.

    Raises:
        JobError: the maps are not finite, or the loss became so.
    """
    num_images = len(targets_NHW)
    total = num_steps(num_images)
    void = int(np.iinfo(targets_NHW.dtype).max)
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = PyramidHead([found.shape[1] for found in maps], num_classes)
    head = head.to(device=device).train()
    optimiser = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, total))
    done = 0
    while done < total:
        order = random.permutation(num_images)
        for start in range(0, num_images, BATCH):
            chosen = np.sort(order[start : start + BATCH])  # files are read in order
            mirrored = bool(random.random() < 0.5)
            targets = _tensor(targets_NHW[chosen].astype(np.int64), device, mirrored)
            inputs = [_tensor(found[chosen].astype(np.float32), device, mirrored) for found in maps]
            logits = interpolate(head(inputs), size=targets.shape[1:], mode="bilinear", align_corners=False)
            loss = _loss(logits, targets, void)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            done += 1
            if not math.isfinite(float(loss.detach())):
                raise JobError("the loss is not finite; are the weights of the backbone damaged?")
            on_step(done, total)
            if done == total:
                break
    return head.cpu().eval()


def _loss(logits: Tensor, targets: Tensor, void: int) -> Tensor:
    """Mean over labelled pixels; 0 where there is none."""
    known = (targets != void).sum().clamp(min=1)
    return cross_entropy(logits, targets, ignore_index=void, reduction="sum") / known


def _rate(step: int, total: int) -> float:
    warm = max(1, total // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / total))


def _tensor(values: NDArray[Any], device: str, mirrored: bool) -> Tensor:
    tensor = torch.from_numpy(values).to(device)
    return tensor.flip(-1) if mirrored else tensor


def target_of(labels_HW: LabelMap, shown: tuple[int, int], size: tuple[int, int], num_classes: int) -> LabelMap:
    """What the decoder should answer for an image fitted into the upper left corner of a view: (height, width) of it.

    Args:
        labels_HW: of the source image.
        shown: (width, height) of the part of the view that shows the image.
        size: (height, width) of the view.
        num_classes: C.
    """
    dtype = label_dtype(num_classes)
    target = np.full(size, np.iinfo(dtype).max, dtype=dtype)
    width, height = shown
    target[:height, :width] = resize_to_source(labels_HW, width, height)
    return target


@torch.inference_mode()
def logits_of(
    head: PyramidHead, maps: Sequence[NDArray[Any]], size: tuple[int, int], *, device: str = "cpu"
) -> NDArray[np.float32]:
    """Logits of every pixel of the view, float32 (n, C, H, W), as a predictor computes them.

    Args:
        head: in evaluation mode, on the device.
        maps: of n images, (n, D, h, w) each.
        size: (height, width) of the view.
        device: as torch names it.
    """
    logits = head([_tensor(np.asarray(found, dtype=np.float32), device, False) for found in maps])
    logits = interpolate(logits, size=size, mode="bilinear", align_corners=False)
    found: NDArray[np.float32] = logits.cpu().numpy()
    return found
