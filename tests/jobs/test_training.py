"""`winnow train`: whole networks by Ray Train; the same by seed; left out, refused, measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import workspaces as ws
from coloured import COLOURS, MANY, again_in, configure, ingest, labelled, recipe, sha256
from delta_tables import HandMade, at
from winnow.errors import CallError, StoppedError
from winnow_connectors.registry import train_work
from winnow_jobs import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.mark.usefixtures("ray_session")
def test_a_whole_network_learns_is_measured_and_answers(tmp_path: Path) -> None:
    workspace = recipe(labelled(tmp_path, splits=MANY), epochs=8, patience=0)
    made = workspace.train("colour")
    assert (made.status, made.version) == ("finished", "colour@1")
    assert dict(made.num_images) == {"train": 48, "val": 51, "test": 18}
    assert made.metrics["test"]["accuracy"] >= 0.9
    fit = made.metrics["fit"]
    assert (fit["epochs"], fit["chosen_by"], fit["precision"]) == (8, "val", "float32")
    losses = [point["train_loss"] for point in fit["curve"]]
    assert losses[-1] < 0.5 * losses[0]
    assert fit["curve"][-1]["val_accuracy"] >= 0.9
    assert made.metrics["calibration"]["fitted_on"] == "val"
    card = workspace.warehouse.registry.card(workspace.warehouse.registry.version("colour@1"))
    assert (card.head, card.classes) == ("linear", tuple(COLOURS))
    assert card.temperature != 1.0
    assert card.labels.counts["train"] == dict.fromkeys(COLOURS, 16)
    # The same labels and seed: nothing to do. Its answers in predict are those that were measured.
    assert workspace.train("colour").status == "nothing to do"
    workspace.promote("colour@1", force=True)
    workspace.predict(tasks=["colour"])
    right = ws.one(
        workspace,
        "SELECT avg((p.label = l.label)::INT) AS accuracy, count(*) AS n FROM latest_predictions AS p JOIN "
        "current_labels AS l USING (image_id) JOIN current_images USING (image_id) WHERE split = 'test'",
    )
    assert (right["n"], right["accuracy"]) == (18, pytest.approx(made.metrics["test"]["accuracy"]))
    # From a head on frozen features, which is kept: it is as good from the first epoch on.
    workspace.train("colour", head=True)
    again = recipe(workspace, epochs=1).train("colour", start="colour@2")
    assert (again.version, again.parent) == ("colour@3", "colour@2")
    assert again.metrics["fit"]["curve"][0]["train_loss"] < losses[0]
    card = workspace.warehouse.registry.card(workspace.warehouse.registry.version("colour@3"))
    assert card.head == "rms_linear"
    workspace.promote("colour@3", force=True)
    assert workspace.predict(tasks=["colour"]).num_answered == 117


@pytest.mark.usefixtures("ray_session")
def test_the_same_seed_gives_the_same_weights_with_two_workers_too(tmp_path: Path) -> None:
    found = []
    first = labelled(tmp_path, splits=MANY)
    for name, workers in (("a", 2), ("b", 2), ("c", 1)):
        workspace = recipe(again_in(first, name), num_workers=workers, epochs=1)
        made = workspace.train("colour")
        assert made.metrics["fit"]["num_workers"] == workers
        found.append((sha256(workspace, "colour@1"), made.metrics["fit"]["curve"][-1]["train_loss"]))
    assert found[0] == found[1]
    # The mean of gradients of halves is that of the whole, up to rounding.
    assert found[2][1] == pytest.approx(found[0][1], rel=1e-3)


@pytest.mark.usefixtures("ray_session")
def test_images_and_labels_that_cannot_be_used_are_left_out_or_stop_it(tmp_path: Path) -> None:
    workspace = recipe(labelled(tmp_path, splits=MANY), epochs=1)
    for split in ("train", "val", "test"):
        path = next((tmp_path / "images" / split / "red").glob("*.png"))
        path.write_bytes(path.read_bytes()[:60])
    ingest(workspace)
    made = workspace.train("colour")
    assert dict(made.num_images) == {"train": 47, "val": 50, "test": 17}
    assert any("3 labelled images could not be used (3 truncated)" in warning for warning in made.warnings)
    row = ws.one(workspace, f"SELECT failures FROM runs WHERE run_id = '{made.run_id}'")
    assert dict(row["failures"]) == {"truncated": 3}
    # Files that vanished are a fault of storage: too many of them stop it, and nothing is published.
    for path in (tmp_path / "images").rglob("*.png"):
        path.unlink()
    with pytest.raises(StoppedError, match="nothing was published"):
        workspace.train("colour", seed=1)
    assert [version.name for version in workspace.models("colour")] == ["colour@1"]
    assert workspace.warehouse.ledger.open_run(train_work("colour")) is None


def test_calls_that_cannot_work_are_refused_before_anything_starts(tmp_path: Path) -> None:
    workspace = recipe(labelled(tmp_path, splits=MANY))
    with pytest.raises(CallError, match="colour@7 does not exist"):
        workspace.train("colour", start="colour@7")
    with pytest.raises(CallError, match="--head always starts from the model"):
        workspace.train("colour", head=True, start="colour@base")
    with pytest.raises(CallError, match="augmentation 'stormy' is unknown"):
        recipe(workspace, augmentation="stormy").train("colour")
    assert workspace.warehouse.ledger.open_runs() == []


# ---------------------------------------------------------------------------------------------------------------- masks


def discs(folder: Path, splits: dict[str, int]) -> Workspace:
    """Bright discs on dark ground, with their masks."""
    configure(folder)
    with (folder / "winnow.toml").open("a") as file:
        file.write(
            '[tasks.discs]\nkind = "segmentation"\nmodel = "./start.safetensors"\narchitecture = "timm/test_resnet"\n'
            'classes = ["ground", "disc"]\nsize = 64\n'
        )
    rows, number = ["uri,split,mask"], 0
    for split, num in splits.items():
        for _ in range(num):
            random = np.random.default_rng(number)
            pixels = random.normal(60, 20, (60, 80, 3))
            y, x = np.mgrid[:60, :80]
            centre, radius = (random.integers(15, 45), random.integers(15, 65)), random.integers(8, 15)
            inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
            pixels[inside] += 110
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
            Image.fromarray(inside.astype(np.uint8)).save(folder / f"{number}-mask.png")
            rows.append(f"{folder / f'{number}.png'},{split},{folder / f'{number}-mask.png'}")
            number += 1
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    workspace = Workspace(folder / "winnow.toml")
    workspace.ingest([str(folder / "manifest.csv")], manifest=True, task="discs")
    return workspace


@pytest.mark.usefixtures("ray_session")
def test_masks_are_learned_with_the_whole_network(tmp_path: Path) -> None:
    workspace = recipe(
        discs(tmp_path, {"train": 24, "val": 8, "test": 8}), epochs=10, batch_size=8, balance="weights", patience=0
    )
    made = workspace.train("discs")
    assert (made.version, dict(made.num_images)) == ("discs@1", {"train": 24, "val": 8, "test": 8})
    assert made.metrics["test"]["mean_iou"] > 0.6
    assert made.metrics["calibration"]["fitted_on"] == "pixels of val"
    card = workspace.warehouse.registry.card(workspace.warehouse.registry.version("discs@1"))
    assert (card.head, card.labels.counts["train"]) == ("pyramid", {"ground": 24, "disc": 24})
    workspace.promote("discs@1", force=True)
    assert workspace.predict(tasks=["discs"]).num_answered == 40
    with pytest.raises(CallError, match="not for masks"):
        recipe(workspace, balance="sampling").train("discs", seed=1)


# ------------------------------------------------------------------------------------------------------ several classes


def several(folder: Path, splits: dict[str, int]) -> Workspace:
    """Images whose left half has one colour and whose right half another or the same, with both as their classes."""
    configure(folder)
    text = (folder / "winnow.toml").read_text()
    (folder / "winnow.toml").write_text(
        text.replace("[tasks.alike]", "multiple_choice = true\nstore_probabilities = true\n[tasks.alike]")
    )
    names, said, number = list(COLOURS), {}, 0
    for split, num in splits.items():
        (folder / "images" / split).mkdir(parents=True)
        for _ in range(num):
            pair = [names[number % 3], names[(number // 3) % 3]]
            random = np.random.default_rng(number)
            halves = [random.normal(COLOURS[name], 15, (32, 16, 3)) for name in pair]
            path = folder / "images" / split / f"{number}.png"
            Image.fromarray(np.concatenate(halves, axis=1).clip(0, 255).astype(np.uint8)).save(path)
            said[path.as_uri()] = sorted(set(pair))
            number += 1
    workspace = Workspace(folder / "winnow.toml")
    workspace.ingest([str(folder / "images")], pattern="{split}/*")
    tables = HandMade(folder / "warehouse" / "tables", exist=True)
    images = workspace.query("SELECT image_id, uri FROM current_images").to_pylist()
    tables.add_rows(
        "labels",
        (
            {"image_id": row["image_id"], "task": "colour", "event": "created", "annotator": "ann"}
            | {"annotation_id": place, "updated_at": at(place)}
            | {"label": said[row["uri"]][0] if len(said[row["uri"]]) == 1 else None}
            | {"value": None if len(said[row["uri"]]) == 1 else json.dumps({"choices": said[row["uri"]]})}
            for place, row in enumerate(images)
        ),
    )
    return workspace


@pytest.mark.usefixtures("ray_session")
def test_several_classes_of_an_image_are_learned_and_answered(tmp_path: Path) -> None:
    workspace = recipe(
        several(tmp_path, {"train": 54, "val": 54, "test": 18}), epochs=15, patience=0, balance="weights"
    )
    with pytest.raises(CallError, match="leave out --head"):
        workspace.train("colour", head=True)
    made = workspace.train("colour")
    assert dict(made.num_images) == {"train": 54, "val": 54, "test": 18}
    test = made.metrics["test"]
    assert test["macro_f1"] > 0.85
    assert set(test["classes"]["red"]) == {"n", "precision", "recall", "f1", "average_precision"}
    assert made.metrics["calibration"]["fitted_on"] == "val"
    assert workspace.evaluate("colour").comparison.candidate.score.value == pytest.approx(test["exact_match"])
    workspace.promote("colour@1", force=True)
    rows = workspace.query(
        "SELECT p.probabilities, p.classes, p.confidence, l.label AS said, l.value FROM latest_predictions AS p "
        "JOIN current_labels AS l USING (image_id) JOIN current_images USING (image_id) WHERE split = 'test'"
    ).to_pylist()
    right = 0
    for row in rows:
        found = {name for name, share in zip(COLOURS, row["probabilities"], strict=True) if share >= 0.5}
        assert set(row["classes"]) == found
        right += found == set(json.loads(row["value"])["choices"] if row["value"] else [row["said"]])
        assert row["confidence"] == pytest.approx(min(max(p, 1 - p) for p in row["probabilities"]))
    assert right / len(rows) == pytest.approx(test["exact_match"])
