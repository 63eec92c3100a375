"""`winnow train --head`: from labels to a version that answers; refused, repeated, killed."""

from __future__ import annotations

import io
import json
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import workspaces as ws
from coloured import COLOURS, configure, ingest, labelled, picture
from winnow.errors import CallError, JobError, OpenRunError, StoppedError
from winnow.metrics import confusion, segmentation_metrics
from winnow.models.loading import load
from winnow.schemas import TABLES
from winnow_connectors.ledger import Plan, new_run_id
from winnow_connectors.registry import train_work
from winnow_jobs import Workspace
from winnow_jobs.train import TrainResult


def train(workspace: Workspace, **options: Any) -> TrainResult:
    return workspace.train("colour", head=True, **options)


# ---------------------------------------------------------------------------------------------------------- one version


def test_labels_become_a_version_that_answers_once_it_is_promoted(tmp_path: Path) -> None:
    workspace = labelled(tmp_path)
    made = train(workspace)
    assert (made.status, made.version) == ("finished", "colour@1")
    assert dict(made.num_images) == {"train": 18, "val": 6, "test": 12}
    assert made.metrics["test"]["accuracy"] == 1.0
    assert made.metrics["fit"]["chosen_by"] == "5 folds of train"
    assert any("fewer than 50" in warning for warning in made.warnings)
    card = workspace.warehouse.registry.card(workspace.warehouse.registry.version("colour@1"))
    assert (card.head, card.classes, card.run) == ("rms_linear", tuple(COLOURS), made.run_id)
    assert card.parent.startswith("start.safetensors#")
    assert card.labels.counts["train"] == dict.fromkeys(COLOURS, 6)
    # 18 images of train answered out of their fold are too few for a temperature.
    assert (card.temperature, card.metrics["calibration"]["fitted_on"]) == (1.0, None)
    assert any("fewer than 20 labelled images" in warning for warning in made.warnings)
    run = ws.one(workspace, f"SELECT * FROM runs WHERE run_id = '{made.run_id}'")
    assert (run["status"], run["tasks"]) == ("finished", ["colour"])
    assert "colour@1: accuracy 1.000 on 12 images" in run["verdict"]
    # Nothing changed: it says so, and names the version.
    again = train(workspace)
    assert (again.status, again.version, again.run_id) == ("nothing to do", "colour@1", made.run_id)
    # It answers as it was measured, through the files of the warehouse.
    workspace.promote("colour@1", force=True)
    model = workspace.task_model("colour")
    (predictor,) = [load(model, fetch=workspace.stores.download)]
    view = model.view.crop
    assert view is not None
    for name, colour in COLOURS.items():
        image = Image.open(io.BytesIO(picture(colour, 1000))).resize((view[1], view[0]))
        probabilities = predictor.predict(np.array(image)[None])[model.id]
        assert model.classes[int(probabilities.argmax())] == name


def test_a_version_is_calibrated_on_images_that_did_not_teach(tmp_path: Path) -> None:
    workspace = labelled(tmp_path, splits={"train": 8, "val": 1, "test": 4})
    made = train(workspace)
    card = workspace.warehouse.registry.card(workspace.warehouse.registry.version("colour@1"))
    assert card.temperature != 1.0
    calibration = made.metrics["calibration"]
    assert calibration["fitted_on"] == "5 folds of train"
    assert calibration["test"]["log_loss"] == made.metrics["test"]["log_loss"]
    assert calibration["test"]["log_loss"] != calibration["test"]["log_loss_before"]
    shown = ws.run(workspace.config_path, "models", "show", "colour@1")
    assert f"temperature   {card.temperature:.3f}, fitted on 5 folds of train" in shown
    assert f"with the temperature, and without: ECE {calibration['test']['ece']:.4f}, " in shown
    # Predict answers the probabilities that were measured.
    workspace.promote("colour@1")
    model = workspace.task_model("colour")
    assert model.temperature == card.temperature


def test_another_seed_or_another_label_makes_another_version(tmp_path: Path) -> None:
    workspace = labelled(tmp_path, splits={"train": 4, "val": 0, "test": 1})
    assert train(workspace).version == "colour@1"
    limited = train(workspace, limit_labels=6)
    assert (limited.version, limited.num_images["train"]) == ("colour@2", 6)
    assert train(workspace, limit_labels=6).version == "colour@2"
    assert train(workspace, limit_labels=500).version == "colour@1"
    (tmp_path / "images/train/red/new.png").write_bytes(picture(COLOURS["red"], 77))
    ingest(workspace)
    assert train(workspace).version == "colour@3"
    weights = [workspace.warehouse.registry.weights(version) for version in workspace.models("colour")]
    assert len(set(weights)) == 3


def test_the_same_work_gives_the_same_weights_to_the_last_bit(tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        workspace = configure(tmp_path / name)
        (tmp_path / "images").mkdir(exist_ok=True)
        source = tmp_path / "images"
        if name == "one":
            for number in range(12):
                label = list(COLOURS)[number % 3]
                (source / "train" / label).mkdir(parents=True, exist_ok=True)
                (source / "train" / label / f"{number}.png").write_bytes(picture(COLOURS[label], number))
        workspace.ingest([str(source)], pattern="{split}/{label}/*", task="colour")
        made = train(workspace)
        assert made.metrics["test"] == {"n": 0}
        weights.append(workspace.warehouse.registry.weights(workspace.warehouse.registry.version(made.version)))
    assert weights[0] == weights[1]


def test_a_limit_adds_labels_to_those_of_a_smaller_one(tmp_path: Path) -> None:
    from winnow_jobs.labelled import labelled_images

    workspace = labelled(tmp_path)
    config = workspace.config.task("colour")

    def drawn(limit: int, seed: int = 0) -> set[str]:
        found = labelled_images(workspace.query_engine(), "colour", config, limit=limit, seed=seed)
        assert found.of("test").num_rows == 12
        return set(found.of("train")["image_id"].to_pylist())

    assert drawn(5) < drawn(9) < drawn(100)
    assert drawn(9) != drawn(9, seed=1)
    assert len(drawn(100)) == 18


@pytest.mark.ray
def test_predict_asks_the_promoted_version(tmp_path: Path, ray_session: None) -> None:
    workspace = labelled(tmp_path, splits={"train": 5, "val": 0, "test": 3})
    made = train(workspace)
    assert "cannot answer colour" in workspace.promote(made.version).why
    result = workspace.predict(["colour"])
    assert (result.models, result.num_answered) == ({"colour": "colour@1"}, 15)  # the promotion asked the 9 of test
    counted = ws.one(
        workspace,
        """
        SELECT count(*) AS images, avg((p.label = l.label)::INT) AS accuracy
        FROM latest_predictions AS p JOIN current_labels AS l USING (image_id, task)
        JOIN current_images AS i USING (image_id) WHERE p.model = 'colour@1' AND i.split = 'test'
        """,
    )
    assert counted == {"images": 9, "accuracy": made.metrics["test"]["accuracy"]}
    assert workspace.predict(["colour"]).status == "nothing to do"
    workspace.rollback("colour")
    with pytest.raises(CallError):  # the model of winnow.toml has other classes than its file
        workspace.predict(["colour"], dry_run=True)
    assert workspace.predict(["colour"], models=["colour@1"]).status == "nothing to do"


# -------------------------------------------------------------------------------------------------------- which images


def test_images_of_the_audit_reserve_are_never_used(tmp_path: Path) -> None:
    workspace = labelled(tmp_path, audit=0.4)
    audit = ws.one(workspace, "SELECT count(*) FILTER (audit) AS audit, count(*) AS images FROM current_images")
    assert 0 < audit["audit"] < audit["images"] == 36
    made = train(workspace)
    assert sum(made.num_images.values()) == audit["images"] - audit["audit"]


def test_images_without_labels_are_looked_at_as_far_as_they_may_be(tmp_path: Path) -> None:
    from winnow_jobs.labelled import labelled_images, unlabelled_images

    workspace = labelled(tmp_path, audit=0.3)
    without = tmp_path / "more"
    for number in range(40):
        for split in ("train", "val", "test"):
            (without / split).mkdir(parents=True, exist_ok=True)
            (without / split / f"{number}.png").write_bytes(picture((120, 120, 40), 500 + number))
    for number in range(5):
        (without / "train" / f"broken{number}.png").write_bytes(b"no image")
    workspace.ingest([str(without)], pattern="{split}/*")
    config = workspace.config.task("colour")
    labels = labelled_images(workspace.query_engine(), "colour", config, limit=4)
    expected = workspace.query(
        "SELECT image_id FROM current_images WHERE split = 'train' AND NOT audit ORDER BY image_id"
    )["image_id"].to_pylist()
    known = set(labels.rows["image_id"].to_pylist())
    expected = [image_id for image_id in expected if image_id not in known]
    assert len(expected) > 15

    def found(most: int) -> list[str]:
        rows = unlabelled_images(workspace.query_engine(), labels, most)
        return [str(image_id) for image_id in rows["image_id"].to_pylist()]

    assert found(1000) == expected
    # Images of test are not among those whose features count.
    count = labels.of("train").num_rows + labels.of("val").num_rows
    assert count < len(known)
    assert found(count + 7) == expected[:7]
    assert found(count) == found(0) == []
    # Those that cannot be read are not missed.
    broken = set(
        workspace.query("SELECT image_id FROM current_images WHERE uri LIKE '%/broken_.png'")["image_id"].to_pylist()
    )
    made = train(workspace, limit_labels=4)
    assert made.metrics["fit"]["num_unlabelled"] == len(set(expected) - broken)
    assert not any("could not be used" in warning for warning in made.warnings)
    # More of them change nothing about what the labels made.
    (without / "train" / "late.png").write_bytes(picture((120, 120, 40), 900))
    workspace.ingest([str(without)], pattern="{split}/*")
    assert train(workspace, limit_labels=4).status == "nothing to do"
    # Of a few that are gone nobody speaks: they are not missed either.
    gone = sorted((without / "train").glob("?.png"))[:3]
    for path in gone:
        path.unlink()
    made = train(workspace, limit_labels=5)
    assert made.metrics["fit"]["num_unlabelled"] >= 15
    assert not any("could not be used" in warning for warning in made.warnings)
    assert ws.one(workspace, f"SELECT failures FROM runs WHERE run_id = '{made.run_id}'") == {"failures": []}
    # But without the storage nothing is made.
    for path in (without / "train").iterdir():
        path.unlink()
    with pytest.raises(StoppedError, match=r"\d+ of \d+ images without labels could not be used, more than max_fail"):
        train(workspace, limit_labels=6)


def test_near_duplicates_of_images_that_measure_are_left_out_of_training(tmp_path: Path) -> None:
    workspace = labelled(tmp_path)
    by_split: dict[str, list[str]] = {}
    for row in workspace.query("SELECT image_id, split FROM current_images ORDER BY uri").to_pylist():
        by_split.setdefault(row["split"], []).append(row["image_id"])
    group = [by_split["test"][0], by_split["train"][0], by_split["val"][0]]
    harmless = by_split["train"][3:5]
    groups = {group[0]: group, harmless[0]: harmless}
    ledger = workspace.warehouse.ledger
    run = ledger.begin(
        Plan(
            new_run_id("duplicates"), "duplicates", ledger.next_numbers(["duplicates-alike"]), "d", {}, 0,
            datetime.now(UTC).isoformat(), "0",
        )
    )  # fmt: skip
    assert run is not None
    rows = [
        {
            "image_id": image_id, "task": "alike", "model": "m", "group_id": first, "kind": "near",
            "representative": first, "similarity": 1.0, "num_images": len(members), "run": run.run_id,
            "at": datetime.now(UTC),
        }
        for first, members in groups.items() for image_id in members
    ]  # fmt: skip
    fragment = run.stage("duplicates", pa.Table.from_pylist(rows, schema=TABLES["duplicates"]))
    run.decide("finished", [fragment], {"tasks": ["alike"]})
    run.close()
    made = train(workspace)
    assert dict(made.num_images) == {"train": 17, "val": 5, "test": 12}
    assert any("2 labelled images were left out: near-duplicates" in warning for warning in made.warnings)


def test_images_that_cannot_be_read_are_left_out_and_said(tmp_path: Path) -> None:
    workspace = labelled(tmp_path)
    (tmp_path / "images/train/red/broken.png").write_bytes(b"no picture")
    ingest(workspace)
    made = train(workspace)
    assert made.num_images["train"] == 18
    assert any("1 labelled images could not be used (1 not_an_image): file://" in said for said in made.warnings)
    assert ws.one(workspace, f"SELECT failures FROM runs WHERE run_id = '{made.run_id}'") == {
        "failures": [("not_an_image", 1)]
    }


def test_storage_that_cannot_be_reached_makes_no_version(tmp_path: Path) -> None:
    workspace = labelled(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(StoppedError, match=r"20 of 20 labelled images could not be used, more than max_failure_share"):
        train(workspace)
    assert workspace.models() == []
    assert workspace.warehouse.ledger.open_runs() == []
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    assert train(workspace).version == "colour@2"
    few = labelled_few(tmp_path / "few")
    (tmp_path / "few" / "images").rename(tmp_path / "few" / "elsewhere")
    with pytest.raises(JobError, match="no labelled image of the train split could be used: file://"):
        train(few)


def labelled_few(folder: Path) -> Workspace:
    folder.mkdir()
    return labelled(folder, splits={"train": 1, "val": 0, "test": 0})


# ----------------------------------------------------------------------------------------------------------- refusals


def test_calls_that_cannot_be_carried_out_say_what_is_missing(tmp_path: Path) -> None:
    workspace = configure(tmp_path)
    with pytest.raises(CallError, match="task 'color' is unknown; configured tasks: alike, colour"):
        workspace.train("color", head=True)
    with pytest.raises(CallError, match="alike is an embedding, which has nothing to learn"):
        workspace.train("alike", head=True)
    with pytest.raises(CallError, match=r"no image has a label for colour; bring labels in"):
        train(workspace)
    images = tmp_path / "images"
    (images / "test" / "red").mkdir(parents=True)
    (images / "test" / "red" / "1.png").write_bytes(picture(COLOURS["red"], 1))
    ingest(workspace)
    with pytest.raises(CallError, match=r"no image of the train split has a label for colour \(labels: 0 train"):
        train(workspace)
    (images / "train" / "red").mkdir(parents=True)
    (images / "train" / "red" / "2.png").write_bytes(picture(COLOURS["red"], 2))
    ingest(workspace)
    with pytest.raises(CallError, match="all 1 labels of colour in the train split are 'red'; a classifier needs"):
        train(workspace)
    assert workspace.models() == []
    assert [info.key for info in workspace.warehouse.store.list("claims/") if "train" in info.key] == []


def test_labels_that_are_no_class_are_listed(tmp_path: Path) -> None:
    labelled(tmp_path)
    text = (tmp_path / "winnow.toml").read_text()
    (tmp_path / "winnow.toml").write_text(text.replace('"red"', '"pink"'))
    with pytest.raises(CallError, match=r"12 labels are no class of colour: 'red' \(12\); add them to tasks\.colour"):
        train(Workspace(tmp_path / "winnow.toml"))
    (tmp_path / "winnow.toml").write_text(text.replace('classes = ["blue", "green", "red"]', ""))
    with pytest.raises(CallError, match=r'tasks.colour has no classes, .* classes = \["blue", "green", "red"\]'):
        train(Workspace(tmp_path / "winnow.toml"))


def test_a_class_without_labels_is_warned_about(tmp_path: Path) -> None:
    workspace = labelled(tmp_path, classes=(*COLOURS, "white"), splits={"train": 2, "val": 0, "test": 1})
    made = train(workspace)
    assert any("no label of the train split has white" in said for said in made.warnings)
    assert any("fewer than 5 labels of the train split have blue (2), green (2), red (2)" in s for s in made.warnings)
    assert made.metrics["test"]["classes"]["white"]["n"] == 0


def test_a_training_of_other_labels_is_refused_while_one_is_open(tmp_path: Path) -> None:
    workspace = labelled(tmp_path, splits={"train": 2, "val": 0, "test": 1})
    ledger = workspace.warehouse.ledger
    other = ledger.begin(
        Plan(new_run_id("train"), "train", ledger.next_numbers([train_work("colour")]), "other", {}, 0,
             datetime.now(UTC).isoformat(), "0")
    )  # fmt: skip
    assert other is not None
    with pytest.raises(OpenRunError, match=f"winnow runs abandon {other.run_id}"):
        train(workspace)
    workspace.abandon(other.run_id)
    assert train(workspace).version == "colour@2"


# --------------------------------------------------------------------------------------------------- commands and kills


def test_killed_after_the_claim_and_run_again_there_is_one_version(tmp_path: Path) -> None:
    workspace = labelled(tmp_path)
    config = workspace.config_path
    process = ws.start(config, "train", "colour", "--head", log=tmp_path / "log")
    try:
        ws.wait_until(
            lambda: (
                workspace.warehouse.ledger.last_claim(train_work("colour")) is not None or process.poll() is not None
            ),
            timeout_s=120,
            what="the claim",
        )
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    finally:
        ws.kill_all_started()
    assert [run.plan.job for run in workspace.warehouse.ledger.open_runs()] == ["train"]
    result = json.loads(ws.run(config, "train", "colour", "--head", "--json"))
    assert (result["status"], result["version"]) == ("finished", "colour@1")
    assert [version.name for version in workspace.models()] == ["colour@1"]
    assert workspace.warehouse.ledger.open_runs() == []
    text = ws.run(config, "train", "colour", "--head")
    assert "nothing to do: colour@1 was made from the same labels" in text
    assert "next: winnow models show colour@1, then winnow models promote colour@1" in text


def test_ctrl_c_leaves_nothing_open(tmp_path: Path) -> None:
    workspace = labelled(tmp_path)
    process = ws.start(workspace.config_path, "train", "colour", "--head", log=tmp_path / "log")
    try:
        ws.wait_until(
            lambda: (
                workspace.warehouse.ledger.last_claim(train_work("colour")) is not None or process.poll() is not None
            ),
            timeout_s=120,
            what="the claim",
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, (tmp_path / "log").read_text()
    finally:
        ws.kill_all_started()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert workspace.warehouse.ledger.open_runs() == []
    assert workspace.models() == []


def test_an_interrupted_training_is_resumed_with_the_labels_it_began_with(tmp_path: Path) -> None:
    import winnow_jobs.train as module

    workspace = labelled(tmp_path, splits={"train": 3, "val": 0, "test": 1})
    config = workspace.config_path
    begun: list[str] = []
    original = module.work_off

    def die(_: Workspace, run: Any) -> TrainResult:
        begun.append(run.run_id)
        raise SystemExit(9)  # neither of the two exceptions that tidy up: as kill -9 leaves it

    module.work_off = die
    try:
        with pytest.raises(SystemExit):
            train(workspace)
    finally:
        module.work_off = original
    (tmp_path / "images/train/red/new.png").write_bytes(picture(COLOURS["red"], 77))
    ingest(workspace)
    with pytest.raises(OpenRunError):
        train(workspace)
    # A Winnow that learns differently does not finish it under the same name.
    trainer, module.TRAINER = module.TRAINER, module.TRAINER + 1
    try:
        with pytest.raises(CallError, match=rf"learns differently\. Give it up with `winnow runs abandon {begun[0]}`"):
            workspace.resume(begun[0])
    finally:
        module.TRAINER = trainer
    assert "colour@1 is made" in ws.run(config, "runs", "resume", begun[0])
    assert workspace.warehouse.registry.version("colour@1").metrics["train"]["n"] == 9
    assert train(workspace).version == "colour@2"


# ---------------------------------------------------------------------------------------------------------------- masks


def scene(number: int) -> tuple[Image.Image, np.ndarray]:
    """A dark picture with a bright rectangle, and its class ids; odd sizes; the last rows are not labelled."""
    random = np.random.default_rng(number)
    height, width = 48 + number % 5, 64 - number % 7
    pixels = random.normal(60, 20, (height, width, 3))
    mask = np.zeros((height, width), dtype=np.uint8)
    top, left = random.integers(2, height // 2), random.integers(2, width // 2)
    mask[top : top + height // 3, left : left + width // 3] = 1
    pixels[mask == 1] += 130
    mask[-3:] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def with_masks(folder: Path, num: int = 24) -> Workspace:
    ws.save_model(folder / "start.safetensors")
    (folder / "winnow.toml").write_text(
        '[tasks.shape]\nkind = "segmentation"\nmodel = "./start.safetensors"\narchitecture = "timm/test_resnet"\n'
        'classes = ["background", "shape"]\nsize = 96\n[splits]\naudit = 0.0\n'
    )
    lines = ["uri,mask,split"]
    for number in range(num):
        image, mask = scene(number)
        image.save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}-mask.png")
        split = ("train", "train", "val", "test")[number % 4]
        lines.append(f"{folder}/{number}.png,{folder}/{number}-mask.png,{split}")
    (folder / "list.csv").write_text("\n".join(lines))
    workspace = Workspace(folder / "winnow.toml")
    workspace.init()
    workspace.ingest([str(folder / "list.csv")])
    return workspace


def test_masks_become_a_version_that_draws_them(tmp_path: Path) -> None:
    workspace = with_masks(tmp_path)
    with pytest.raises(CallError, match="winnow train TASK --head"):
        workspace.task_model("shape")
    made = workspace.train("shape", head=True)
    assert (made.version, dict(made.num_images)) == ("shape@1", {"train": 12, "val": 6, "test": 6})
    assert made.metrics["test"]["mean_iou"] > 0.6
    assert made.metrics["test"]["classes"]["shape"]["pixels"] > 0
    card = workspace.warehouse.registry.card(workspace.warehouse.registry.version("shape@1"))
    assert (card.head, card.labels.counts["test"]) == ("pyramid", {"background": 6, "shape": 6})
    assert card.temperature != 1.0
    calibration = made.metrics["calibration"]
    assert calibration["fitted_on"] == "pixels of val"
    assert calibration["val"]["log_loss"] <= calibration["val"]["log_loss_before"]
    assert calibration["test"]["n"] > 6 * 1_000
    assert workspace.train("shape", head=True).status == "nothing to do"
    # What predict answers with the published files is what was measured.
    workspace.promote("shape@1", force=True)
    model = workspace.task_model("shape")
    predictor = load(model, fetch=workspace.stores.download)
    from winnow.images import DecodeLimits, decode
    from winnow.masks import resize_to_source

    total = np.zeros((2, 2), dtype=np.int64)
    for number in range(3, 24, 4):
        image, mask = scene(number)
        data = (tmp_path / f"{number}.png").read_bytes()
        limits = DecodeLimits(max_bytes=10**6, max_pixels=10**6, timeout_s=9)
        pixels = decode(data, limits=limits, views=[model.view]).views[0]
        (answer,) = predictor.predict(pixels[None], [image.size])[model.id]
        total += confusion(mask, resize_to_source(answer.labels_HW, *image.size), 2, void=255)
    found = segmentation_metrics(total, model.classes, 6)
    assert found["mean_iou"] == pytest.approx(made.metrics["test"]["mean_iou"], abs=0.01)


def test_masks_that_cannot_be_used_are_left_out_and_said(tmp_path: Path) -> None:
    workspace = with_masks(tmp_path, num=24)
    Image.fromarray(np.zeros((5, 5), dtype=np.uint8)).save(tmp_path / "0-mask.png")
    (tmp_path / "4-mask.png").unlink()
    wrong = np.full((48 + 3, 64 - 1), 7, dtype=np.uint8)
    Image.fromarray(wrong).save(tmp_path / "8-mask.png")
    made = workspace.train("shape", head=True)
    assert made.num_images["train"] == 9
    (said,) = [warning for warning in made.warnings if "could not be used" in warning]
    assert "3 labelled images could not be used (3 label)" in said
    assert "a mask needs the size of its image" in said
