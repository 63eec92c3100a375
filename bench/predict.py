"""Images/s of `winnow predict` beside a plain loop in one process over the same photographs.

    python bench/predict.py FOLDER [--limit 2000] [--s3] [--model torchvision/mobilenet_v2@IMAGENET1K_V1]

The loop is what torchvision's documentation shows: Pillow, ``weights.transforms()``, the eager float32 network, batches
of 32, labels into a Parquet file. Each runs in a process of its own. "Wall" is from start to end of that process,
"images/s" counts from the first answers on. Last it says for how many photographs both give the same label.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from click import echo

from winnow_jobs import Workspace
from winnow_jobs.local_s3 import REGION, LocalS3

SUFFIXES = {".jpg", ".jpeg", ".png"}
BATCH = 32


def plain_loop(paths: list[Path], model: str, target: Path) -> None:
    """Write the label of every file; print images/s from the end of the first batch on."""
    import torch
    from PIL import Image, ImageOps
    from torchvision.models import get_model, get_model_weights

    name, _, weights_name = model.removeprefix("torchvision/").partition("@")
    weights = get_model_weights(name)[weights_name]
    network = get_model(name, weights=weights).eval()
    transforms = weights.transforms()
    labels: list[str] = []
    started = 0.0
    with torch.inference_mode():
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            images = [transforms(ImageOps.exif_transpose(Image.open(path)).convert("RGB")) for path in batch]
            chosen = network(torch.stack(images)).softmax(dim=1).argmax(dim=1).tolist()
            labels += [weights.meta["categories"][index] for index in chosen]
            started = started or time.perf_counter()
    rate = (len(paths) - BATCH) / (time.perf_counter() - started)
    pq.write_table(pa.table({"uri": [str(path) for path in paths], "label": labels}), target)
    echo(json.dumps({"images_per_s": rate}))


@contextlib.contextmanager
def place(folder: Path, on_s3: bool) -> Iterator[tuple[str, str]]:
    """Where images and warehouse go: a URI, and the storage section of the configuration that reaches it."""
    if not on_s3:
        yield folder.as_uri(), ""
        return
    server = LocalS3(folder / "s3")
    server.start()
    try:
        server.create_bucket("photos")
        yield (
            "s3://photos",
            f'[storage."s3://"]\nendpoint = "{server.endpoint}"\nregion = "{REGION}"\nprofile = "winnow-local"\n'
            f'credentials_file = "{server.credentials_file}"\n',
        )
    finally:
        server.stop()


def timed(command: list[str], folder: Path) -> tuple[dict[str, object], float]:
    """What a command prints as JSON, and the seconds it took."""
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - started


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs, also in folders below it")
    parser.add_argument("--limit", type=int, default=2000, help="take only so many photographs")
    parser.add_argument("--model", default="torchvision/mobilenet_v2@IMAGENET1K_V1", help="torchvision/NAME@WEIGHTS")
    parser.add_argument("--s3", action="store_true", help="images and warehouse on a local S3 server")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    files = (path.resolve() for path in options.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    paths = sorted(files)[: options.limit]
    if len(paths) <= BATCH:
        parser.error(f"needs more than {BATCH} of {' or '.join(sorted(SUFFIXES))} below {options.folder}")
    if options.plain is not None:
        plain_loop(paths, options.model, options.plain)
        return
    echo(f"{options.model}, {len(paths):,} photographs, {os.cpu_count()} CPUs\n")
    echo("| | images/s | wall, s |")
    echo("|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as name:
        folder = Path(name)
        same = [str(options.folder.resolve()), "--limit", str(options.limit), "--model", options.model]
        plain = [sys.executable, str(Path(__file__).resolve()), *same, "--plain", str(folder / "plain.parquet")]
        found, wall = timed(plain, folder)
        echo(f"| plain loop | {found['images_per_s']:.1f} | {wall:.1f} |")
        with place(folder, options.s3) as (uri, section):
            config = folder / "winnow.toml"
            config.write_text(
                f'{section}[warehouse]\nuri = "{uri}/warehouse"\n[tasks.objects]\nmodel = "{options.model}"\n'
            )
            workspace = Workspace(config)
            workspace.init()
            images = workspace.stores.at(f"{uri}/images/")
            for number, path in enumerate(paths):
                images.put(f"{number:06d}{path.suffix}", path.read_bytes())
            workspace.ingest([f"{uri}/images/"])
            found, wall = timed([str(Path(sys.executable).with_name("winnow")), "predict", "--json"], folder)
            echo(f"| winnow predict | {found['images_per_s']:.1f} | {wall:.1f} |")
            echo(f"\n{found['verdict']}")
            echo(f"seconds: {found['seconds']}")
            ours = workspace.query("SELECT label FROM latest_predictions ORDER BY uri")["label"].to_pylist()
        theirs = pq.read_table(folder / "plain.parquet")["label"].to_pylist()
        same_label = sum(a == b for a, b in zip(ours, theirs, strict=True))
        echo(f"same label: {same_label:,} of {len(paths):,}")


if __name__ == "__main__":
    main()
