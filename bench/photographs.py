"""Labelled photographs in memory, for measurements that fit many heads: features as a training sees them, labels.

FOLDER is as for ``bench/heads.py``; a column ``contributor`` of its ``manifest.csv`` says which photographs belong
together. Legend: N photographs, in the order of the manifest; D features; C classes.
"""

from __future__ import annotations

import csv
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from heads import rows_of, workspace_of
from numpy.typing import NDArray
from PIL import Image

from winnow.models.linear_head import LinearHead, fit_linear_head, rms_norm
from winnow.models.references import resolve_backbone
from winnow.perceptual_hash import perceptual_hash
from winnow_jobs.heads import HeadJob
from winnow_jobs.labelled import labelled_images


@dataclass(frozen=True)
class Photographs:
    """What is known of N photographs.

    Attributes:
        features_ND: of the frozen backbone, float32.
        classes_N: class of each, int64; C of them, numbered as their names are sorted.
        splits_N: ``train``, ``val`` or ``test``.
        groups_N: who took it; the photograph itself where that is unknown.
        phashes_N: perceptual hashes, uint64.
    """

    features_ND: NDArray[np.float32]
    classes_N: NDArray[np.int64]
    splits_N: NDArray[np.str_]
    groups_N: NDArray[np.str_]
    phashes_N: NDArray[np.uint64]

    @property
    def num_classes(self) -> int:
        return int(self.classes_N.max()) + 1

    @property
    def vectors_ND(self) -> NDArray[np.float32]:
        """What an embedding task with the same model answers: features of length 1."""
        vectors_ND: NDArray[np.float32] = self.features_ND / np.linalg.norm(self.features_ND, axis=1, keepdims=True)
        return vectors_ND

    def head(self, teach: NDArray[np.int64], choose: NDArray[np.int64], seen: NDArray[np.int64]) -> LinearHead:
        """The head that ``winnow train --head`` makes of features scaled as it does; see ``scaled_ND``.

        Args:
            teach: numbers of the photographs that it learns from.
            choose: of those that choose strength and temperature.
            seen: those whose features are looked at, with or without label: these and others.
        """
        scaled_ND, classes_N = self.scaled_ND, self.classes_N
        return fit_linear_head(
            scaled_ND[teach],
            classes_N[teach],
            self.num_classes,
            chooser=(scaled_ND[choose], classes_N[choose]),
            shown_ND=scaled_ND[seen],
        )

    @cached_property
    def scaled_ND(self) -> NDArray[np.float32]:
        """Features as the head looks at them."""
        return rms_norm(self.features_ND)

    def of(self, split: str) -> NDArray[np.int64]:
        """Numbers of the photographs of a split."""
        return np.flatnonzero(self.splits_N == split)


def photographs(folder: Path, crop: float, cache: Path | None) -> Photographs:
    """Read and compute, or load what was kept in the folder ``cache``; photographs that cannot be read are an error."""
    folder = folder.resolve()
    kept = None if cache is None else cache / f"{folder.name}-{crop:g}.npz"
    if kept is not None and kept.exists():
        with np.load(kept) as found:
            return Photographs(**{name: found[name] for name in Photographs.__dataclass_fields__})
    rows = rows_of(folder)
    features = _features(rows, crop)
    owners = _contributors(folder)
    names = sorted({row["label"] for row in rows})
    found = Photographs(
        features_ND=np.stack([features[row["uri"]] for row in rows]),
        classes_N=np.array([names.index(row["label"]) for row in rows], dtype=np.int64),
        splits_N=np.array([row["split"] for row in rows]),
        groups_N=np.array([owners.get(row["uri"], row["uri"]) for row in rows]),
        phashes_N=np.array([_phash(row["uri"]) for row in rows], dtype=np.uint64),
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, **{name: getattr(found, name) for name in Photographs.__dataclass_fields__})
    return found


def _features(rows: list[dict[str, str]], crop: float) -> dict[str, NDArray[np.float32]]:
    features: dict[str, NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        workspace = workspace_of(rows, Path(scratch, "all"), crop)
        config = workspace.config.task("kind")
        labels = labelled_images(workspace.query_engine(), "kind", config)
        backbone = resolve_backbone(config, base_dir=workspace.folder, fetch=workspace.stores.download)
        classes = config.classes or ()
        job = HeadJob(workspace, "kind", config.kind, classes, 0, backbone, labels, workspace.config.predict)

        def use(_: object, featured: Any) -> None:
            for image, found in zip(featured.images, featured.features[0], strict=True):
                features[image.row["uri"].removeprefix("file://")] = found
            job.num_images[featured.images[0].row["split"]] += len(featured.images)

        job.read(use)
    return features


def _contributors(folder: Path) -> dict[str, str]:
    manifest = folder / "manifest.csv"
    rows = list(csv.DictReader(manifest.open())) if manifest.exists() else []
    return {str(folder / row["file"]): row["contributor"] for row in rows if row.get("contributor")}


def _phash(path: str) -> int:
    with Image.open(path) as image:
        return int(perceptual_hash(image.convert("RGB")), 16)
