"""What several tasks in one `winnow predict` cost, beside each task alone.

    python bench/tasks.py FOLDER [--limit 1000]

Three tasks: classification with MobileNetV2 (``IMAGENET1K_V1``), embedding with the same backbone, and segmentation
with torchvision's LR-ASPP at 256 pixels, whose weights are random: they take the time of trained ones. Each line is a
run of its own over the same photographs on local disk. "Forward" is the CPU time of inference per image. The last line
compares the run of all tasks with the dearest task alone plus the forwards of the others, in seconds at work after
start-up.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from click import echo
from predict import SUFFIXES, timed

from winnow_jobs import Workspace

OBJECTS = '[tasks.objects]\nmodel = "torchvision/mobilenet_v2@IMAGENET1K_V1"\n'
ALIKE = '[tasks.alike]\nkind = "embedding"\nmodel = "torchvision/mobilenet_v2@IMAGENET1K_V1"\n'
PARTS = (
    '[tasks.parts]\nkind = "segmentation"\nmodel = "{weights}"\n'
    'architecture = "torchvision/lraspp_mobilenet_v3_large"\nclasses = ["background", "object"]\nsize = 256\n'
)


def random_segmenter(path: Path) -> None:
    """LR-ASPP with two classes and random weights."""
    import torch
    from safetensors.torch import save_file
    from torchvision.models import get_model

    torch.manual_seed(0)
    network = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=2)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)


def run(folder: Path, photographs: Path, num_images: int, sections: list[str]) -> dict[str, Any]:
    """Ingest and predict in a workspace of its own; what predict printed."""
    folder.mkdir()
    (folder / "winnow.toml").write_text("".join(sections))
    workspace = Workspace(folder / "winnow.toml")
    workspace.init()
    workspace.ingest([str(photographs)])
    command = [str(Path(sys.executable).with_name("winnow")), "predict", "--limit", str(num_images), "--json"]
    found, _ = timed(command, folder)
    return found


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs, also in folders below it")
    parser.add_argument("--limit", type=int, default=1000, help="take only so many photographs")
    options = parser.parse_args()
    if not any(path.suffix.lower() in SUFFIXES for path in options.folder.rglob("*")):
        parser.error(f"there is no {' or '.join(sorted(SUFFIXES))} below {options.folder}")
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as name:
        folder = Path(name)
        random_segmenter(folder / "masks.safetensors")
        parts = PARTS.format(weights=folder / "masks.safetensors")
        sets = {
            "classification": [OBJECTS],
            "embedding": [ALIKE],
            "segmentation": [parts],
            "classification and embedding": [OBJECTS, ALIKE],
            "all three": [OBJECTS, ALIKE, parts],
        }
        echo(f"{options.limit:,} photographs, {os.cpu_count()} CPUs\n")
        echo("| tasks | images/s | at work, s | forward, ms of CPU |")
        echo("|---|---|---|---|")
        working: dict[str, float] = {}
        forward: dict[str, float] = {}
        for number, (tasks, sections) in enumerate(sets.items()):
            found = run(folder / str(number), options.folder.resolve(), options.limit, sections)
            working[tasks], forward[tasks] = found["seconds"]["working"], found["seconds"]["inference_cpu"]
            num_images = found["num_asked"] / len(sections)
            echo(
                f"| {tasks} | {found['images_per_s']:.1f} | {working[tasks]:.1f} | "
                f"{1000 * forward[tasks] / num_images:.1f} |"
            )
    dearest = max(("classification", "embedding", "segmentation"), key=lambda tasks: working[tasks])
    # Classification and embedding share a forward pass, so the other two cost one; both cores work on it.
    others = 0.0 if dearest != "segmentation" else forward["classification"] / (os.cpu_count() or 1)
    others += 0.0 if dearest == "segmentation" else forward["segmentation"] / (os.cpu_count() or 1)
    bound = working[dearest] + others
    echo(
        f"\nall three: {working['all three']:.1f} s; {dearest} alone and the other forwards: {bound:.1f} s; "
        f"ratio {working['all three'] / bound:.2f}"
    )


if __name__ == "__main__":
    main()
