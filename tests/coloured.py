"""Pictures of three colours, for tests that train: workspaces with labels in every split."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import workspaces as ws
from winnow_jobs import Workspace

COLOURS = {"blue": (30, 40, 200), "green": (40, 180, 60), "red": (200, 40, 40)}
SPLITS = {"train": 6, "val": 2, "test": 4}
MANY = {"train": 16, "val": 17, "test": 6}


def picture(colour: tuple[int, int, int], number: int) -> bytes:
    pixels = np.random.default_rng(number).normal(colour, 25, (24, 32, 3)).clip(0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def configure(folder: Path, *, classes: tuple[str, ...] | None = tuple(COLOURS), audit: float = 0.0) -> Workspace:
    ws.save_model(folder / "start.safetensors")
    named = f"classes = {json.dumps(classes)}" if classes else ""
    (folder / "winnow.toml").write_text(
        f'[tasks.colour]\nmodel = "./start.safetensors"\narchitecture = "timm/test_resnet"\n{named}\n'
        '[tasks.alike]\nkind = "embedding"\nmodel = "./start.safetensors"\narchitecture = "timm/test_resnet"\n'
        f"[splits]\naudit = {audit}\n"
    )
    workspace = Workspace(folder / "winnow.toml")
    workspace.init()
    return workspace


def labelled(folder: Path, *, splits: dict[str, int] = SPLITS, **config: Any) -> Workspace:
    """Pictures of three colours in folders by split and label, ingested."""
    workspace = configure(folder, **config)
    number = 0
    for split, num in splits.items():
        for name, colour in COLOURS.items():
            place = folder / "images" / split / name
            place.mkdir(parents=True, exist_ok=True)
            for _ in range(num):
                (place / f"{number}.png").write_bytes(picture(colour, number))
                number += 1
    ingest(workspace)
    return workspace


def ingest(workspace: Workspace) -> None:
    workspace.ingest([str(workspace.folder / "images")], pattern="{split}/{label}/*", task="colour")


def recipe(workspace: Workspace, **values: Any) -> Workspace:
    """The workspace with a section [train]: quick, unless the test says otherwise."""
    given = {"epochs": 3, "batch_size": 16, "learning_rate": 0.003, "head_learning_rate": 0.03, **values}
    text = workspace.config_path.read_text().partition("\n[train]")[0]
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in given.items())
    workspace.config_path.write_text(f"{text}\n[train]\n{lines}\n")
    return Workspace(workspace.config_path, num_cpus=2)


def again_in(workspace: Workspace, name: str) -> Workspace:
    """The same images, with the same ids, in a warehouse of their own."""
    text = workspace.config_path.read_text()
    other = workspace.folder / f"{name}.toml"
    other.write_text(f'[warehouse]\nuri = "./{name}"\n{text}')
    found = Workspace(other, num_cpus=2)
    found.init()
    ingest(found)
    return found


def sha256(workspace: Workspace, version: str) -> str:
    return workspace.warehouse.registry.version(version).sha256
