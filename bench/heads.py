"""What a head on frozen features reaches: ``winnow train TASK --head`` on labelled photographs, with its own figures.

FOLDER holds ``train/CLASS/*.jpg``, ``val/…`` and ``test/…``, and may hold ``manifest.csv`` with a column ``file`` whose
order decides what "the first N labels" are; else it is the order of the names.

::

    python bench/heads.py FOLDER                      # all labels, the first 100, and 100 drawn five times
    python bench/heads.py FOLDER --crop 0.875 --labels 300
    python bench/heads.py FOLDER --compare 50 100 300 700      # many draws: the head, and what it is made of
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from click import echo

from winnow.calibration import expected_calibration_error
from winnow.metrics import log_loss
from winnow.models import linear_head
from winnow.models.linear_head import rms_norm
from winnow.models.references import resolve_backbone
from winnow.uncertainty import softmax
from winnow_jobs import Workspace
from winnow_jobs.heads import HeadJob
from winnow_jobs.labelled import labelled_images

CONFIG = """
[tasks.kind]
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"
crop = {crop}
classes = {classes}
[splits]
audit = 0.0
"""
SHARES = linear_head.SHARES


def rows_of(folder: Path) -> list[dict[str, str]]:
    """uri, label and split of every photograph, in the order that decides which labels come first."""
    manifest = folder / "manifest.csv"
    names = [row["file"] for row in csv.DictReader(manifest.open())] if manifest.exists() else []
    paths = [folder / name for name in names] or sorted(folder.glob("*/*/*.jpg"))
    return [{"uri": str(path), "label": path.parent.name, "split": path.parent.parent.name} for path in paths]


def workspace_of(rows: list[dict[str, str]], folder: Path, crop: float) -> Workspace:
    """A workspace that knows these photographs and their labels."""
    folder.mkdir()
    classes = sorted({row["label"] for row in rows} - {""})
    (folder / "winnow.toml").write_text(CONFIG.format(crop=crop, classes=json.dumps(classes)))
    with (folder / "photographs.csv").open("w") as file:
        writer = csv.DictWriter(file, ["uri", "label", "split"])
        writer.writeheader()
        writer.writerows(rows)
    workspace = Workspace(folder / "winnow.toml")
    workspace.init()
    workspace.ingest([str(folder / "photographs.csv")])
    return workspace


def report(what: str, workspace: Workspace, **options: int) -> float:
    """Train, tell the figures, and give the accuracy on the test split."""
    started = time.monotonic()
    result = workspace.train("kind", head=True, **options)
    test, val, fit = result.metrics["test"], result.metrics["val"], result.metrics["fit"]
    calibration = result.metrics["calibration"]["test"]
    echo(
        f"{what:24} test {test['accuracy']:.3f} (macro F1 {test['macro_f1']:.3f}, n {test['n']})  "
        f"val {val['accuracy']:.3f}  ECE {calibration['ece_before']:.3f} -> {calibration['ece']:.3f}  "
        f"log-loss {calibration['log_loss_before']:.3f} -> {calibration['log_loss']:.3f}  "
        f"L2 {fit['l2_strength']:.3g}, share {fit['lda_share']:g}, shrinkage {fit['lda_shrinkage']}  "
        f"{time.monotonic() - started:.0f} s",
    )
    return float(test["accuracy"])


def features_of(workspace: Workspace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Features (N, D) and labels (N,) of every split, as a training sees them."""
    config = workspace.config.task("kind")
    labels = labelled_images(workspace.query_engine(), "kind", config)
    backbone = resolve_backbone(config, base_dir=workspace.folder, fetch=workspace.stores.download)
    classes = config.classes or ()
    job = HeadJob(workspace, "kind", config.kind, classes, 0, backbone, labels, workspace.config.predict)
    found: dict[str, list[tuple[np.ndarray, list[int]]]] = {}

    def use(_: object, featured: Any) -> None:
        numbers = [classes.index(image.row["label"]) for image in featured.images]
        found.setdefault(featured.images[0].row["split"], []).append((featured.features[0], numbers))
        job.num_images["train"] += len(numbers)

    job.read(use)
    return {
        split: (np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))
        for split, parts in found.items()
    }


def compare(workspace: Workspace, sizes: list[int], num_draws: int) -> None:
    """The head and what it is made of on the same draws; val chooses; judged on the rest of train, and on test.

    Directions are emphasised by all images of train and val, as in a training that reads so many without labels.
    Log-loss and calibration error are those of images whose class was drawn at all.
    """
    features = features_of(workspace)
    train_N, test_N = features["train"][1], features["test"][1]
    scaled = {split: rms_norm(images_ND) for split, (images_ND, _) in features.items()}
    shown_ND = np.concatenate([scaled["train"], scaled["val"]])
    plain = {split: images_ND for split, (images_ND, _) in features.items()}
    ways: dict[str, tuple[dict[str, np.ndarray], np.ndarray | None, tuple[float, ...]]] = {
        "regression": (plain, None, ()),
        "with a share of LDA": (plain, None, SHARES),
        "and scaled features": (scaled, None, SHARES),
        "and emphasis: the head": (scaled, shown_ND, SHARES),
    }
    random = np.random.default_rng(0)
    for size in sizes:
        found: dict[str, list[list[float]]] = {name: [] for name in ways}
        for _ in range(num_draws):
            order = random.permutation(len(train_N))
            drawn, rest = order[:size], order[size:]
            for name, (images, shown, shares) in ways.items():
                linear_head.SHARES = shares  # type: ignore[assignment]
                head = linear_head.fit_linear_head(
                    images["train"][drawn],
                    train_N[drawn],
                    int(train_N.max()) + 1,
                    chooser=(images["val"], features["val"][1]),
                    shown_ND=shown,
                )
                figures = []
                for images_ND, labels_N in ((images["train"][rest], train_N[rest]), (images["test"], test_N)):
                    probabilities = softmax(head.logits(images_ND) / (head.temperature or 1.0))
                    known = np.isin(labels_N, train_N[drawn])
                    figures += [
                        float((probabilities.argmax(axis=1) == labels_N).mean()),
                        log_loss(labels_N[known], probabilities[known]),
                        expected_calibration_error(probabilities[known], labels_N[known]),
                    ]
                found[name].append([*figures, head.share])
        first = np.array(found["regression"])
        for name, rows in found.items():
            mean = np.mean(rows, axis=0)
            echo(
                f"{size:5} labels, {num_draws} draws  {name:23} rest of train: accuracy {mean[0]:.4f}, log-loss "
                f"{mean[1]:.4f}, ECE {mean[2]:.4f}  test: {mean[3]:.4f}, {mean[4]:.4f}, {mean[5]:.4f}  "
                f"share {mean[6]:.2f}"
            )
            if name != "regression":
                differences = np.array(rows) - first
                errors = differences.std(axis=0, ddof=1) / num_draws**0.5
                echo(
                    "      minus the first, and its standard error: "
                    + ", ".join(
                        f"{d:+.4f} ± {e:.4f}" for d, e in zip(differences.mean(axis=0)[:6], errors, strict=False)
                    )
                )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crop", type=float, default=1.0)
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--compare", type=int, nargs="+", metavar="N")
    arguments = parser.parse_args()
    rows = rows_of(arguments.folder.resolve())
    train = [row for row in rows if row["split"] == "train"]
    with tempfile.TemporaryDirectory() as scratch:
        everything = workspace_of(rows, Path(scratch, "all"), arguments.crop)
        if arguments.compare:
            compare(everything, arguments.compare, arguments.draws)
            return
        report(f"all {len(train):,} labels", everything)
        first = [{**row, "label": ""} if row in train[arguments.labels :] else row for row in rows]
        report(f"the first {arguments.labels}", workspace_of(first, Path(scratch, "first"), arguments.crop))
        found = [
            report(f"{arguments.labels} drawn, seed {seed}", everything, limit_labels=arguments.labels, seed=seed)
            for seed in range(arguments.draws)
        ]
    if found:
        echo(f"mean of {len(found)} draws {statistics.mean(found):.3f}, {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()
