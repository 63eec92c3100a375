"""What a head on frozen features reaches: ``winnow train TASK --head`` on labelled photographs, with its own figures.

FOLDER holds ``train/CLASS/*.jpg``, ``val/…`` and ``test/…``, and may hold ``manifest.csv`` with a column ``file`` whose
order decides what "the first N labels" are; else it is the order of the names.

::

    python bench/heads.py FOLDER                      # all labels, the first 100, and 100 drawn five times
    python bench/heads.py FOLDER --crop 0.875 --labels 300
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
from pathlib import Path

from click import echo

from winnow_jobs import Workspace

CONFIG = """
[tasks.kind]
model = "torchvision/mobilenet_v2@IMAGENET1K_V1"
crop = {crop}
classes = {classes}
[splits]
audit = 0.0
"""


def rows_of(folder: Path) -> list[dict[str, str]]:
    """uri, label and split of every photograph, in the order that decides which labels come first."""
    manifest = folder / "manifest.csv"
    names = [row["file"] for row in csv.DictReader(manifest.open())] if manifest.exists() else []
    paths = [folder / name for name in names] or sorted(folder.glob("*/*/*.jpg"))
    return [{"uri": str(path), "label": path.parent.name, "split": path.parent.parent.name} for path in paths]


def workspace_of(rows: list[dict[str, str]], folder: Path, crop: float) -> Workspace:
    """A workspace that knows these photographs and their labels."""
    folder.mkdir()
    classes = sorted({row["label"] for row in rows})
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
    test, val = result.metrics["test"], result.metrics["val"]
    echo(
        f"{what:24} test {test['accuracy']:.3f} (macro F1 {test['macro_f1']:.3f}, n {test['n']})  "
        f"val {val['accuracy']:.3f}  L2 {result.metrics['fit']['l2_strength']:g}  {time.monotonic() - started:.0f} s",
    )
    return float(test["accuracy"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--crop", type=float, default=1.0)
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    rows = rows_of(arguments.folder.resolve())
    train = [row for row in rows if row["split"] == "train"]
    with tempfile.TemporaryDirectory() as scratch:
        everything = workspace_of(rows, Path(scratch, "all"), arguments.crop)
        report(f"all {len(train):,} labels", everything)
        first = train[: arguments.labels] + [row for row in rows if row["split"] != "train"]
        report(f"the first {arguments.labels}", workspace_of(first, Path(scratch, "first"), arguments.crop))
        found = [
            report(f"{arguments.labels} drawn, seed {seed}", everything, limit_labels=arguments.labels, seed=seed)
            for seed in range(arguments.draws)
        ]
    if found:
        echo(f"mean of {len(found)} draws {statistics.mean(found):.3f}, {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    main()
