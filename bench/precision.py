"""What every shortcut costs in accuracy, on real photographs.

    python bench/precision.py FOLDER [--model torchvision/mobilenet_v2@IMAGENET1K_V1] [--device cpu] [--limit N]

The reference is torchvision's own ``weights.transforms()`` on the decoded image and its eager float32 network. Per
image the largest difference of a class probability is taken; the table shows how those are distributed, how often the
likeliest class is the same, and, where it is not, the largest margin that the reference had between its top two.

Photographs that are too small for scaled decoding are also enlarged and saved again, which makes both sides large.
"""

from __future__ import annotations

import argparse
import functools
import io
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from click import echo
from numpy.typing import NDArray
from PIL import Image, ImageOps

from winnow.config import Precision, TaskConfig
from winnow.images import DecodeLimits, View, decode
from winnow.models.architectures import torchvision_weights
from winnow.models.loading import load
from winnow.models.references import ResolvedModel, resolve
from winnow.uncertainty import margin, softmax

LIMITS = DecodeLimits(max_bytes=10**9, max_pixels=10**9, timeout_s=60.0)
SUFFIXES = {".jpg", ".jpeg", ".png"}
ENLARGED_SIDE_PX = 1200
BATCH = 16

Probabilities = NDArray[np.float32]


def reference(files: Iterable[bytes], model: ResolvedModel) -> Probabilities:
    """Probabilities (N, C) as torchvision computes them: its transforms, its eager network, one image at a time."""
    import torch
    from torchvision.models import get_model

    name = model.architecture.partition("/")[2]
    weights = torchvision_weights(name, model.weights)
    network, transforms = get_model(name, weights=weights).eval(), weights.transforms()
    logits = []
    with torch.inference_mode():
        for data in files:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            logits.append(network(transforms(image).unsqueeze(0))[0].numpy())
    return softmax(np.stack(logits))


def pixels(files: Iterable[bytes], view: View, *, scaled: bool) -> NDArray[np.uint8]:
    """uint8 (N, H, W, 3) as Winnow decodes them."""
    return np.stack([decode(data, limits=LIMITS, views=(view,), scaled=scaled).views[0] for data in files])


def predict(images: NDArray[np.uint8], model: ResolvedModel, precision: Precision, device: str) -> Probabilities:
    """Probabilities (N, C) as Winnow computes them; the time to load the model counts."""
    predictor = load(model, device=device, precision=precision)
    starts = range(0, len(images), BATCH)
    return np.concatenate([predictor.predict(images[start : start + BATCH])[model.id] for start in starts])


def enlarge(data: bytes) -> bytes:
    """The photograph with its shorter side at ``ENLARGED_SIDE_PX``, as JPEG of quality 90."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    factor = ENLARGED_SIDE_PX / min(image.size)
    size = round(image.width * factor), round(image.height * factor)
    stream = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def show(name: str, expected: Probabilities, got: Probabilities, seconds: float) -> None:
    """One row of the table."""
    differences = np.abs(got - expected).max(axis=1)
    differs = expected.argmax(axis=1) != got.argmax(axis=1)
    largest = f"{margin(expected[differs]).max():.4f}" if differs.any() else "none differ"
    p50, p90, p99 = np.percentile(differences, [50, 90, 99])
    agreement = f"{100 * (1 - differs.mean()):.2f} %"
    columns = *(f"{value:.1e}" for value in (p50, p90, p99, differences.max())), agreement, largest, f"{seconds:.0f}"
    echo(f"| {name} | {' | '.join(columns)} |")


def timed(work: Callable[[], Probabilities]) -> tuple[Probabilities, float]:
    """What ``work`` gives, and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs, also in folders below it")
    parser.add_argument("--model", default="torchvision/mobilenet_v2@IMAGENET1K_V1", help="a torchvision reference")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="take only so many photographs")
    options = parser.parse_args()
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in SUFFIXES)[: options.limit]
    if not paths:
        parser.error(f"no {' or '.join(sorted(SUFFIXES))} below {options.folder}")
    files = [path.read_bytes() for path in paths]
    model = resolve(TaskConfig(model=options.model), base_dir=Path())
    echo(f"{model.id}, {len(files)} photographs, {options.device}\n")
    echo("| against torchvision, eager float32 | median | 90 % | 99 % | max | top-1 agrees | margin where not | s |")
    echo("|---|---|---|---|---|---|---|---|")

    expected, seconds = timed(functools.partial(reference, files, model))
    show("itself", expected, expected, seconds)
    images = pixels(files, model.view, scaled=False)
    precisions: list[Precision] = ["float32", "bfloat16"]
    if options.device != "cpu":
        precisions.append("float16")
    for precision in precisions:
        got, seconds = timed(functools.partial(predict, images, model, precision, options.device))
        show(f"full decoding, {precision}", expected, got, seconds)

    files = [enlarge(data) for data in files]
    expected = reference(files, model)
    for scaled in (False, True):
        images = pixels(files, model.view, scaled=scaled)
        got, seconds = timed(functools.partial(predict, images, model, "float32", options.device))
        show(f"enlarged, {'scaled' if scaled else 'full'} decoding, float32", expected, got, seconds)


if __name__ == "__main__":
    main()
