"""Writes docs/walk.md: runs every command of the walk for real and keeps what it printed, with pictures.

    python docs/walk/make.py

Needs the extras ``demo`` and ``dev`` and MobileNetV2's weights (``winnow demo`` fetches them). Takes some minutes. The
photographs ship inside scikit-image and scikit-learn; the masks of the coins are made by a watershed, as in
scikit-image's own tutorial on region-based segmentation.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from click import echo
from PIL import Image, ImageEnhance

HERE = Path(__file__).resolve().parent
WINNOW = Path(sys.executable).with_name("winnow")
SKIMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "motorcycle_left.png", "motorcycle_right.png", "page.png", "retina.jpg", "rocket.jpg"),
)
SKLEARN = ("china.jpg", "flower.jpg")
CONFIG = """
[warehouse]
uri = "s3://photos/warehouse"

[tasks.objects]                                 # what is on it
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"

[tasks.alike]                                   # vectors: what looks like what
kind = "embedding"
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"

[tasks.coins]                                   # where the coins are; nobody has trained that yet
kind = "segmentation"
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"
classes = ["background", "coin"]
size = 256

[augmentations.handled]                         # how else the same coins could lie there
transforms = [
    { name = "RandomHorizontalFlip" },
    { name = "RandomVerticalFlip" },
    { name = "RandomRotation", degrees = 180, interpolation = "bilinear" },
    { name = "ColorJitter", brightness = 0.3, contrast = 0.3 },
]
"""


class Walk:
    """A folder to work in, and the Markdown so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[str] = []

    def say(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(text.strip() + "\n")

    def show(self, language: str, text: str) -> None:
        """A block as it stands."""
        self.parts.append(f"```{language}\n{text.strip()}\n```\n")

    def run(self, *commands: str, keep: int = 40) -> str:
        """Run commands as a reader would type them; their output, shortened, becomes a block."""
        lines: list[str] = []
        for command in commands:
            echo(f"$ {command}")
            found = self._typed(command).replace(str(self.folder), "…").strip().split("\n")
            lines += [f"$ {command}", *found[:keep], *(["…"] if len(found) > keep else [])]
        self.show("console", "\n".join(lines))
        return "\n".join(lines)

    def _typed(self, command: str) -> str:
        """What a command prints on a terminal, its progress and log left out."""
        terminal, end = os.openpty()
        path = f"{WINNOW.parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "COLUMNS": "118", "NO_COLOR": "1"}
        with subprocess.Popen(
            ["bash", "-c", command], cwd=self.folder, env=environment, stdout=end, stderr=subprocess.PIPE, text=True
        ) as process:
            os.close(end)
            printed = b""
            with contextlib.suppress(OSError):  # EIO: the command has closed its end
                while part := os.read(terminal, 65_536):
                    printed += part
            os.close(terminal)
            assert process.stderr is not None
            said = process.stderr.read()
        if process.returncode:
            raise SystemExit(f"{command}: exit code {process.returncode}\n{printed.decode()}\n{said[-4000:]}")
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", printed.decode()).replace("\r\n", "\n")

    def picture(self, name: str, image: Image.Image, text: str) -> None:
        """A picture beside the walk, as a small JPEG without metadata."""
        image.convert("RGB").save(HERE / f"{name}.jpg", quality=82)
        self.parts.append(f"![{text}](walk/{name}.jpg)\n")


def package_file(package: str, folder: str, name: str) -> bytes:
    """A file inside an installed package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / folder / name).read_bytes()


def fill_bucket(walk: Walk) -> None:
    """Photographs, a few copies such as any bucket collects, and tiles of a picture of coins with their masks."""
    from scipy import ndimage
    from skimage import filters, segmentation

    from winnow_jobs import Workspace

    bucket = Workspace(walk.folder / "winnow.toml").stores.at("s3://photos/")
    files = {f"photos/{name}": package_file("skimage", "data", name) for name in SKIMAGE}
    files |= {f"photos/{name}": package_file("sklearn", "datasets/images", name) for name in SKLEARN}
    cat = Image.open(io.BytesIO(files["photos/chelsea.png"])).convert("RGB")
    cup = Image.open(io.BytesIO(files["photos/coffee.png"])).convert("RGB")
    files["photos/phone/IMG_0001.png"] = files["photos/chelsea.png"]
    files["photos/phone/cat-small.jpg"] = jpeg(cat.resize((300, 200)), 70)
    files["photos/web/cat-cropped.jpg"] = jpeg(cat.crop((20, 10, 440, 290)), 85)
    files["photos/web/coffee-bright.jpg"] = jpeg(ImageEnhance.Brightness(cup).enhance(1.3), 80)
    files["photos/broken/half.png"] = files["photos/coffee.png"][:100_000]
    coins = np.asarray(Image.open(io.BytesIO(package_file("skimage", "data", "coins.png"))).convert("L"))
    markers = np.zeros_like(coins)
    markers[coins < 30], markers[coins > 150] = 1, 2
    mask = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(coins), markers) == 2).astype(np.uint8)
    rows = []
    splits = ["train", "train", "val", "train", "train", "test"]
    for number, split in enumerate(splits):
        top, left = number // 3 * 151, number % 3 * 128
        tile = np.s_[top : top + 151, left : left + 128]
        for kind, pixels in (("tile", coins), ("mask", mask)):
            sink = io.BytesIO()
            Image.fromarray(pixels[tile]).save(sink, "PNG")
            files[f"coins/{kind}-{number}.png"] = sink.getvalue()
        rows.append([f"s3://photos/coins/tile-{number}.png", f"s3://photos/coins/mask-{number}.png", split])
    for key, data in files.items():
        bucket.put(key, data)
    with (walk.folder / "coins.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["uri", "mask", "split"], *rows])


def jpeg(image: Image.Image, quality: int) -> bytes:
    """The picture as a JPEG file."""
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def main() -> None:
    """Walk, then write."""
    with tempfile.TemporaryDirectory(prefix="winnow-walk-") as name:
        walk = Walk(Path(name) / "workspace")
        walk.folder.mkdir()
        try:
            take(walk)
        finally:
            subprocess.run([WINNOW, "services", "down"], cwd=walk.folder, check=False, capture_output=True)
    text = "\n".join(walk.parts)
    (HERE.parent / "walk.md").write_text(re.sub(r"[ \t]+\n", "\n", text))


def take(walk: Walk) -> None:
    """The walk itself."""
    walk.say(
        """
# A walk: from a bucket to masks, search and duplicates

Every command below was run as it stands, by `python docs/walk/make.py`, on two CPUs; its output is what it printed. The
photographs ship inside scikit-image and scikit-learn.
"""
    )
    walk.say("## A bucket\n\nA local S3 server stands in for yours.")
    walk.run("winnow services up --only s3 --bucket photos")
    status = subprocess.run(
        [WINNOW, "services", "status", "--only", "s3", "--json"],
        cwd=walk.folder,
        check=True,
        capture_output=True,
        text=True,
    )
    (walk.folder / "winnow.toml").write_text(section_of(status.stdout) + CONFIG)
    fill_bucket(walk)
    walk.say(
        """
It holds fifteen photographs, what people do to photographs (a second upload of the cat, a small one, a cropped one, a
brighter cup), half a file, and a picture of coins cut into six tiles. `winnow.toml` asks three things:
"""
    )
    walk.show("toml", CONFIG)
    walk.run("winnow init", "winnow ingest s3://photos/photos/")

    walk.say(
        """
## Two answers in one pass

`objects` and `alike` name the same network, so every image is fetched once, decoded once, and goes through it once.
"""
    )
    walk.run("winnow predict --task objects --task alike")
    walk.run(
        'winnow query "SELECT uri, label, round(confidence, 2) AS confidence FROM latest_predictions '
        'ORDER BY confidence DESC LIMIT 5"',
        'winnow query "SELECT uri, task, error, message FROM failures"',
    )

    walk.say("## What looks like this?\n\nAn image that is known, by its URI; any file works as well.")
    walk.run("winnow search s3://photos/photos/chelsea.png -k 5 --sheet alike.png")
    walk.picture("search", Image.open(walk.folder / "alike.png"), "The five images most like the cat")

    walk.say("## What is there twice, and what is like nothing else?")
    walk.run(
        "winnow duplicates",
        'winnow query "SELECT group_id[:6] AS g, kind, round(similarity, 3) AS similarity, hamming, uri '
        'FROM duplicate_groups ORDER BY g, similarity DESC"',
        'winnow query "SELECT uri, round(outlier_score, 3) AS score FROM outliers ORDER BY score DESC LIMIT 3"',
    )

    walk.say(
        """
## Masks for a class of one's own

Nobody has published a network that finds coins. Six tiles have masks, named by a manifest:
"""
    )
    walk.run("head -3 coins.csv", "winnow ingest coins.csv --task coins")
    walk.say(
        """
Four of them are for training: few. A policy makes twelve more of each, the masks turned along with the images, as
images of the same split.
"""
    )
    walk.run(
        "winnow augment handled --to s3://photos/augmented --copies 12 "
        "--where \"uri LIKE '%/coins/tile-%' AND split = 'train'\""
    )
    walk.say("A light decoder on the frozen feature maps of MobileNetV2 learns from them; then it goes to work.")
    walk.run("winnow train coins --head", "winnow models promote coins@1")
    walk.run(
        "winnow predict --task coins --where \"uri LIKE '%/coins/tile-%'\"",
        'winnow query "SELECT uri, label, round(area_share, 2) AS area, round(confidence, 2) AS confidence '
        "FROM latest_segments WHERE label = 'coin' ORDER BY uri\"",
        "winnow export masks --task coins --to masks --overlay --where \"uri LIKE '%/tile-5.png'\"",
    )
    overlay = next((walk.folder / "masks").glob("*.overlay.jpg"))
    walk.picture("overlay", Image.open(overlay), "The mask of a tile that was not learned from")

    walk.say(
        """
## On

`winnow models show coins@1` prints the card of the version: what it learned from and how good it is. Every command run
again does nothing, because nothing is new. [tables.md](tables.md) lists every column, [models.md](models.md) says what
is computed, [masks.md](masks.md), [similarity.md](similarity.md) and [augmentation.md](augmentation.md) have the rest.
"""
    )


def section_of(status: str) -> str:
    """The storage section that ``winnow services`` gives for the configuration."""
    return "\n".join(service["config"] for service in json.loads(status)["services"])


if __name__ == "__main__":
    main()
