"""`winnow evaluate` and what `models promote` makes of it: over tables made by hand, and once with real answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

import workspaces as ws
from delta_tables import HandMade, at
from model_versions import make_version
from winnow.errors import CallError
from winnow.intervals import paired_difference, wilson
from winnow.mask_files import write_png
from winnow.masks import encode_classes
from winnow.metrics import confusion, segmentation_metrics
from winnow_connectors.label_tasks import class_columns
from winnow_jobs import Workspace
from winnow_jobs.cli.main import cli
from winnow_jobs.evaluate import slices

TASK = ws.TASK
CLASSES = ws.CLASSES


def image_id(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


class Compared:
    """So many labelled test images; image n is of class n % 5. Versions answer what a test says."""

    def __init__(self, folder: Path, num_images: int = 200, num_versions: int = 2) -> None:
        self.workspace = Workspace(ws.write_config(folder))
        self.workspace.init()
        self.tables = HandMade(folder / "warehouse" / "tables", exist=True)
        weights = (folder / "small.safetensors").read_bytes()
        for _ in range(num_versions):
            make_version(self.workspace.warehouse.registry, self.workspace.warehouse.ledger, TASK, weights)
        self.labels = [CLASSES[n % 5] for n in range(num_images)]
        self.add_images(range(num_images))

    def add_images(self, numbers: Sequence[int], **changes: Any) -> None:
        self.tables.add_rows(
            "images",
            (
                {
                    "image_id": image_id(n),
                    "uri": f"s3://b/{'dark' if n % 4 == 0 else 'light'}/{n}.jpg",
                    "group": f"g{n}",
                }
                | {"split": "test", "size": 1000 + n, "metadata": [("camera", "old" if n % 10 == 0 else "new")]}
                | changes
                for n in numbers
            ),
        )
        self.tables.add_rows(
            "labels",
            (
                {"image_id": image_id(n), "task": TASK, "label": CLASSES[n % 5], "event": "imported"}
                | {"origin": "imported", "audit": False, "updated_at": at(0)}
                for n in numbers
            ),
        )

    def answer(self, model: str, wrong: Sequence[int] = (), *, failed: Mapping[int, str] | None = None) -> None:
        """Right about all images but the wrong ones; the failed ones have no answer, for a fault of that stage."""
        failed = failed or {}
        self.tables.add_rows(
            "outcomes",
            (
                {"image_id": image_id(n), "task": TASK, "model": model, "width": 40, "height": 32, "format": "JPEG"}
                | ({"status": "failed", "stage": failed[n], "error": "x"} if n in failed else {})
                for n in range(len(self.labels))
            ),
        )
        self.tables.add_rows(
            "predictions",
            (
                {"image_id": image_id(n), "task": TASK, "model": model}
                | {"label": CLASSES[(n + 1) % 5] if n in set(wrong) else CLASSES[n % 5]}
                for n in range(len(self.labels))
                if n not in failed
            ),
        )

    def put_into_production(self, name: str) -> None:
        self.workspace.warehouse.registry.promote(name)

    @property
    def production(self) -> str:
        return self.workspace.warehouse.registry.production(TASK)

    def num_runs(self, job: str) -> int:
        return self.workspace.query(f"SELECT * FROM runs WHERE job = '{job}' AND run_id != 'r1'").num_rows

    def cli(self, *arguments: str) -> str:
        return (
            CliRunner()
            .invoke(cli, ["--config", str(self.workspace.config_path), *arguments], catch_exceptions=False)
            .output
        )


@pytest.fixture
def compared(tmp_path: Path) -> Compared:
    made = Compared(tmp_path)
    made.put_into_production("objects@1")
    return made


def test_both_are_measured_on_the_same_images_with_the_interval_of_their_difference(compared: Compared) -> None:
    compared.answer("objects@1", wrong=range(40))
    compared.answer("objects@2", wrong=range(35, 50))
    found = compared.workspace.evaluate(TASK)
    assert (found.status, found.candidate, found.against) == ("finished", "objects@2", "objects@1")
    comparison = found.comparison
    assert (comparison.measure, comparison.n) == ("accuracy", 200)
    assert comparison.baseline is not None
    assert comparison.difference is not None
    assert (comparison.baseline.score.value, comparison.candidate.score.value) == (0.8, 0.925)
    assert (comparison.candidate.score.low, comparison.candidate.score.high) == wilson(185, 200)
    assert comparison.difference.value == pytest.approx(0.125)
    assert (comparison.difference.low, comparison.difference.high) == paired_difference(35, 10, 200)
    assert comparison.classes["ant"].value == pytest.approx(5 / 40)
    ant = comparison.candidate.classes["ant"]
    assert (ant.n, ant.score) == (40, 37 / 40)
    assert found.decision.promote
    # A rerun does nothing and says the same; so does the table.
    again = compared.workspace.evaluate(TASK)
    assert (again.status, again.run_id, again.comparison) == ("nothing to do", found.run_id, comparison)
    assert again.slices == found.slices
    row = ws.one(compared.workspace, "SELECT version, detail, run FROM models WHERE event = 'measured'")
    detail = json.loads(row["detail"])
    assert (row["version"], row["run"], detail["against"], detail["n"]) == ("objects@2", found.run_id, "objects@1", 200)
    assert detail["labels"] == found.labels
    run = ws.one(compared.workspace, "SELECT * FROM runs WHERE job = 'evaluate'")
    assert run["verdict"].startswith("objects@2: accuracy 0.9250 on 200 test images; +0.1250")
    # Another label is another comparison.
    compared.tables.add("labels", image_id=image_id(0), task=TASK, label="dog", audit=False, updated_at=at(5))
    third = compared.workspace.evaluate(TASK)
    assert (third.status, third.labels == found.labels) == ("finished", False)
    assert compared.num_runs("evaluate") == 2


def test_only_labelled_test_images_outside_the_audit_count(compared: Compared) -> None:
    compared.add_images(range(1000, 1030), split="train")
    compared.add_images(range(1030, 1060), audit=True)
    compared.add_images(range(1060, 1090), parent=image_id(0))
    compared.answer("objects@1")
    compared.answer("objects@2")
    assert compared.workspace.evaluate(TASK).comparison.n == 200


def test_what_a_model_fails_on_is_wrong_and_what_cannot_be_read_is_left_out(compared: Compared) -> None:
    compared.answer("objects@1", failed={0: "fetch", 1: "decode"})
    compared.answer("objects@2", failed={1: "decode", 2: "infer", 3: "infer"})
    found = compared.workspace.evaluate(TASK)
    assert (found.comparison.n, found.num_left_out) == (198, 2)
    assert found.comparison.candidate.score.value == pytest.approx(196 / 198)
    assert "2 labelled test images are left out" in found.notes[0]
    assert compared.workspace.evaluate(TASK).notes == found.notes


def test_slices_show_where_the_candidate_is_worst(compared: Compared) -> None:
    compared.answer("objects@1", wrong=range(0, 200, 7))
    compared.answer("objects@2", wrong=range(0, 200, 10))  # the pictures of the old camera
    found = compared.workspace.evaluate(TASK)
    worst = found.slices[0]
    assert (worst.column, worst.value, worst.n, worst.score) == ("camera", "old", 20, 0.0)
    assert (worst.low, worst.high) == wilson(0, 20)
    assert worst.baseline == pytest.approx(17 / 20)
    by_folder = compared.workspace.evaluate(TASK, by=["folder"]).slices
    assert [(each.value, each.n) for each in by_folder] == [("dark", 50), ("light", 150)]
    assert {each.value for each in compared.workspace.evaluate(TASK, by=["size"]).slices} == {
        *("1,000 – 1,049", "1,050 – 1,099", "1,100 – 1,149", "1,150 – 1,199")
    }
    grouped = compared.workspace.evaluate(TASK, by=["group"]).slices
    assert [(each.value, each.n) for each in grouped] == [("(200 small values)", 200)]
    with pytest.raises(CallError, match=r"column 'lens' is unknown; the images can be cut by folder, .*, camera"):
        compared.workspace.evaluate(TASK, by=["lens"])
    # What is in production, for the report: without a comparison, and without asking anything.
    ours = slices(compared.workspace, TASK, ["camera"])
    assert [(each.value, each.n, each.baseline) for each in ours] == [("new", 180, None), ("old", 20, None)]
    assert slices(compared.workspace, TASK)[0].column == "camera"


def test_a_better_version_is_promoted_and_the_event_says_why(compared: Compared) -> None:
    compared.answer("objects@1", wrong=range(40))
    compared.answer("objects@2", wrong=range(35, 50))
    move = compared.workspace.promote("objects@2")
    assert (move.production, move.before, compared.production) == ("objects@2", "objects@1", "objects@2")
    assert "accuracy +0.1250" in move.why
    (event,) = [
        json.loads(row["detail"])
        for row in compared.workspace.warehouse.registry.history(TASK)
        if row["version"] == "objects@2"
    ]
    assert (event["before"], event["against"], event["n"]) == ("objects@1", "objects@1", 200)
    assert (event["candidate"], event["baseline"], event["margin"]) == (0.925, 0.8, 0.01)
    assert "force" not in event
    assert compared.workspace.promote("objects@2").run_id is None
    shown = compared.cli("models", "show", "objects@2")
    assert "measured" in shown
    assert "against objects@1 on 200 test images" in shown


REFUSED = [
    # wrong about by production, wrong about by the candidate, what the refusal says
    (range(20), range(30), "the accuracy did not rise: the difference is -0.0500"),
    (range(12), range(12, 22), "the accuracy may fall by more than the margin of 0.01: the 95 % interval"),
    # 40 others are right now, but of the ants 16 of 40 are lost
    ([n for n in range(200) if n % 5][:60], range(0, 80, 5), "ant got worse by more than 0.05: recall 1.0000 → 0.6000"),
]


@pytest.mark.parametrize(("before", "after", "says"), REFUSED)
def test_a_version_that_is_not_good_enough_is_refused_with_the_figures(
    compared: Compared, before: Sequence[int], after: Sequence[int], says: str
) -> None:
    compared.answer("objects@1", wrong=before)
    compared.answer("objects@2", wrong=after)
    with pytest.raises(CallError) as caught:
        compared.workspace.promote("objects@2")
    message = str(caught.value)
    assert says in message
    for figure in (f"accuracy {1 - len(before) / 200:.4f} → {1 - len(after) / 200:.4f}", "(95 % interval ", "--force"):
        assert figure in message
    assert compared.production == "objects@1"
    assert compared.num_runs("evaluate") == 1
    assert "may not be promoted" in compared.cli("evaluate", TASK)
    # By force, and recorded with the figures that there are.
    assert compared.workspace.promote("objects@2", force=True).production == "objects@2"
    detail = json.loads(compared.workspace.warehouse.registry.history(TASK)[-1]["detail"])
    assert (detail["force"], detail["n"], detail["before"]) == (True, 200, "objects@1")
    assert "by force" in compared.cli("models", "show", "objects@2")


def test_the_rule_is_that_of_winnow_toml(compared: Compared) -> None:
    compared.answer("objects@1", wrong=range(12))
    compared.answer("objects@2", wrong=range(12, 22))
    assert not compared.workspace.evaluate(TASK).decision.promote
    path = compared.workspace.config_path
    path.write_text(path.read_text() + "[promotion]\nmargin = 0.1\n")
    again = Workspace(path).evaluate(TASK)
    assert (again.status, again.decision.promote) == ("nothing to do", True)


def test_force_needs_no_comparison(compared: Compared) -> None:
    assert compared.workspace.promote("objects@2", force=True).production == "objects@2"
    detail = json.loads(compared.workspace.warehouse.registry.history(TASK)[-1]["detail"])
    assert detail == {"before": "objects@1", "force": True}


def test_another_version_in_production_meanwhile_is_not_passed_over(compared: Compared) -> None:
    with pytest.raises(CallError, match="objects@1 went into production meanwhile, but objects@2 was compared with"):
        compared.workspace.warehouse.registry.promote("objects@2", expected="objects@base")


def test_a_first_version_is_compared_with_the_model_of_winnow_toml(tmp_path: Path) -> None:
    made = Compared(tmp_path, num_versions=1)
    base = made.workspace.task_model(TASK).id
    made.answer(base, wrong=range(100))
    made.answer("objects@1", wrong=range(20))
    found = made.workspace.evaluate(TASK)
    assert (found.against, found.comparison.baseline.score.value) == ("objects@base", 0.5)  # type: ignore[union-attr]
    assert made.workspace.promote("objects@1").production == "objects@1"


def test_where_the_model_of_winnow_toml_cannot_answer_it_is_enough_to_be_measured(tmp_path: Path) -> None:
    made = Compared(tmp_path, num_versions=1)
    made.answer("objects@1", wrong=range(150))
    path = made.workspace.config_path
    path.write_text(path.read_text().replace('"eel"]', '"eel", "fly"]'))  # the network has five outputs
    workspace = Workspace(path)
    found = workspace.evaluate(TASK)
    assert (found.comparison.baseline, found.comparison.difference) == (None, None)
    assert "objects@base, the model of winnow.toml, cannot answer objects" in found.notes[0]
    assert found.decision.promote
    assert [each.baseline for each in found.slices] == [None] * len(found.slices)
    move = workspace.promote("objects@1")
    assert "it is enough for a promotion to be measured; there is nothing to compare with; accuracy 0.2500" in move.why


def test_a_class_that_a_model_does_not_know_is_said(tmp_path: Path) -> None:
    made = Compared(tmp_path, num_versions=1)
    weights = (tmp_path / "small.safetensors").read_bytes()
    other = ("ant", "bee", "cat", "dog", "fly")
    registry, ledger = made.workspace.warehouse.registry, made.workspace.warehouse.ledger
    make_version(registry, ledger, TASK, weights, classes=other)
    path = made.workspace.config_path
    path.write_text(path.read_text().replace('"eel"]', '"eel", "fly"]'))
    made.put_into_production("objects@1")
    made.answer("objects@1")
    made.answer("objects@2", wrong=range(4, 200, 5))
    found = Workspace(path).evaluate(TASK)
    assert "objects@2 does not know eel, so it is wrong about all 40 images of them" in found.notes
    assert found.decision.worse == ("eel",)


def test_of_several_classes_an_image_the_whole_set_counts(tmp_path: Path) -> None:
    made = Compared(tmp_path, num_images=0, num_versions=0)
    path = made.workspace.config_path
    path.write_text(path.read_text().replace(f"[tasks.{TASK}]", f"[tasks.{TASK}]\nmultiple_choice = true"))
    made.workspace = Workspace(path)
    weights = (tmp_path / "small.safetensors").read_bytes()
    for _ in range(2):
        make_version(
            made.workspace.warehouse.registry, made.workspace.warehouse.ledger, TASK, weights, multi_label=True
        )
    made.put_into_production("objects@1")
    said = [["ant", "bee"], ["ant"], [], ["bee"]] * 30
    images = {"split": "test", "size": 1000}
    made.tables.add_rows("images", ({"image_id": image_id(n), "uri": f"s3://b/{n}.jpg", **images} for n in range(121)))
    labels = {"task": TASK, "event": "imported", "origin": "imported", "audit": False, "updated_at": at(0)}
    columns = [class_columns(each) for each in [*said, ["unsure"]]]
    made.tables.add_rows(
        "labels", ({"image_id": image_id(n), "label": c[0], "value": c[1], **labels} for n, c in enumerate(columns))
    )
    answers = {
        "objects@1": [["ant"] if n % 4 == 0 else each for n, each in enumerate(said)],
        "objects@2": [each[::-1] if n >= 12 else ["ant", "bee", "cat"] for n, each in enumerate(said)],
    }
    for model, found in answers.items():
        mine = {"task": TASK, "model": model}
        made.tables.add_rows("outcomes", ({"image_id": image_id(n), **mine, "width": 40} for n in range(120)))
        made.tables.add_rows(
            "predictions",
            ({"image_id": image_id(n), **mine, "label": "ant", "classes": each} for n, each in enumerate(found)),
        )
    comparison = made.workspace.evaluate(TASK).comparison
    assert comparison.n == 120  # nobody knows the classes of the last one
    assert comparison.baseline is not None
    assert (comparison.candidate.score.value, comparison.baseline.score.value) == (0.9, 0.75)
    assert comparison.candidate.classes["bee"].precision == pytest.approx(60 / 66)
    assert comparison.baseline.classes["bee"].score == 0.5


def test_wrong_calls_are_refused_with_what_is_valid(compared: Compared) -> None:
    def refused(message: str, task: str = TASK, **options: Any) -> None:
        with pytest.raises(CallError, match=message):
            compared.workspace.evaluate(task, **options)

    refused("task 'hats' is unknown", task="hats")
    refused("objects@9 does not exist; versions of objects: objects@2, objects@1", candidate="objects@9")
    refused("write TASK@NUMBER", against="one")
    refused("hats@1 is a version of hats, not of objects", candidate="hats@1")
    refused("objects@1 would be compared with itself", candidate="objects@1")
    with pytest.raises(CallError, match="is unknown"):
        compared.workspace.resume("none")


def test_without_versions_or_labels_it_says_what_to_do(tmp_path: Path) -> None:
    made = Compared(tmp_path, num_images=0, num_versions=0)
    with pytest.raises(CallError, match="objects has no model version yet; `winnow train objects --head` makes one"):
        made.workspace.evaluate(TASK)
    weights = (tmp_path / "small.safetensors").read_bytes()
    make_version(made.workspace.warehouse.registry, made.workspace.warehouse.ledger, TASK, weights)
    with pytest.raises(CallError, match="no image of the test split has a label for objects"):
        made.workspace.evaluate(TASK)
    with pytest.raises(
        CallError, match=r"objects@1 is not promoted: no image of the test split .* --force promotes it"
    ):
        made.workspace.promote("objects@1")
    assert slices(made.workspace, TASK) == []
    assert made.production == "objects@base"


def test_the_command_speaks_to_people_and_machines(compared: Compared) -> None:
    compared.answer("objects@1", wrong=range(40))
    compared.answer("objects@2", wrong=range(35, 50))
    output = compared.cli("evaluate", TASK)
    for part in (
        "objects@2 against objects@1, 200 test images (run ",
        "accuracy of objects@2  0.9250 (0.8",
        "difference             +0.1250 (+0.0",
        "ant\t40\t0.800 → 0.925\t+0.125",
        "slices of objects@2, worst first",
        "may be promoted: accuracy +0.1250",
        "next: winnow models promote objects@2",
    ):
        assert part in output
    assert "compared before, run " in compared.cli("evaluate", TASK, "--by", "camera")
    found = json.loads(compared.cli("evaluate", TASK, "--by", "camera", "--json"))
    assert found["comparison"]["difference"]["value"] == pytest.approx(0.125)
    assert {each["column"] for each in found["slices"]} == {"camera"}
    assert found["decision"]["promote"]


def test_predictions_of_former_versions_stay_and_the_newest_are_shown(compared: Compared) -> None:
    compared.answer("objects@1")
    compared.put_into_production("objects@2")
    assert compared.workspace.predict([TASK], dry_run=True).num_asked == 200  # all are pending for it
    compared.tables.run("r2", finished=2)
    compared.tables.add(
        "predictions", image_id=image_id(0), task=TASK, model="objects@2", label="eel", at=at(9), run="r2"
    )
    counted = compared.workspace.query(
        "SELECT model, count(*) AS n FROM latest_predictions GROUP BY 1 ORDER BY 1"
    ).to_pylist()
    assert counted == [{"model": "objects@1", "n": 199}, {"model": "objects@2", "n": 1}]
    assert compared.workspace.query("SELECT * FROM predictions").num_rows == 201


def test_killed_before_it_publishes_and_run_again_it_compares_once(
    compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    from winnow_connectors.ledger import Run

    class Died(BaseException):
        pass

    def die(*_: object) -> None:
        raise Died

    compared.answer("objects@1", wrong=range(40))
    compared.answer("objects@2")
    monkeypatch.setattr(Run, "decide", die)
    with pytest.raises(Died):
        compared.workspace.evaluate(TASK)
    monkeypatch.undo()
    (left,) = compared.workspace.warehouse.ledger.open_runs()
    with pytest.raises(CallError, match=f"run {left.run_id} wrote nothing that counts; `winnow evaluate` does it anew"):
        compared.workspace.resume(left.run_id)
    assert compared.workspace.evaluate(TASK).status == "finished"
    assert compared.workspace.evaluate(TASK).status == "nothing to do"
    assert compared.workspace.warehouse.ledger.open_runs() == []
    assert ws.one(compared.workspace, "SELECT count(*) AS n FROM models WHERE event = 'measured'") == {"n": 1}


@pytest.mark.ray
def test_missing_answers_are_asked_once_and_of_labelled_test_images_alone(tmp_path: Path, ray_session: None) -> None:
    made = Compared(tmp_path, num_images=0)
    made.put_into_production("objects@1")
    for number in range(30):
        place = tmp_path / "images" / ("test" if number < 20 else "train") / CLASSES[number % 5]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(ws.small_jpeg(number))
    made.workspace.ingest([str(tmp_path / "images")], pattern="{split}/{label}/*", task=TASK)
    measured = "split = 'test' AND NOT audit"
    num = ws.one(made.workspace, f"SELECT count(*) AS n FROM current_images WHERE {measured}")["n"]
    found = made.workspace.evaluate(TASK)
    assert found.comparison.difference is not None
    assert (found.comparison.n, found.comparison.difference.value) == (num, 0.0)  # both have the same weights
    asked = made.workspace.query("SELECT model, count(*) AS n FROM outcomes GROUP BY 1 ORDER BY 1").to_pylist()
    assert asked == [{"model": "objects@1", "n": num}, {"model": "objects@2", "n": num}]
    again = made.workspace.evaluate(TASK)
    assert (again.status, again.comparison) == ("nothing to do", found.comparison)
    assert (made.num_runs("predict"), made.num_runs("evaluate")) == (2, 1)


# --------------------------------------------------------------------------------------------------------------- masks


PARTS = ("background", "hole", "rim")


def masked(folder: Path, num_images: int) -> tuple[Workspace, dict[str, NDArray[np.int64]]]:
    """Test images of 40 × 30 with masks in files, and the answers of two versions at half that size.

    Returns:
        The workspace, and by version what ``confusion`` says of all images.
    """
    (folder / "winnow.toml").write_text(
        '[tasks.parts]\nkind = "segmentation"\nmodel = "torchvision/lraspp_mobilenet_v3_large"\n'
        f"classes = {json.dumps(PARTS)}\n"
    )
    workspace = Workspace(folder / "winnow.toml")
    workspace.init()
    tables = HandMade(folder / "warehouse" / "tables", exist=True)
    for _ in range(2):
        make_version(
            *(workspace.warehouse.registry, workspace.warehouse.ledger, "parts"), kind="segmentation", classes=PARTS
        )
    random = np.random.default_rng(0)
    totals = {f"parts@{number}": np.zeros((3, 3), dtype=np.int64) for number in (1, 2)}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("images", "labels", "outcomes", "segments")}
    for n in range(num_images):
        small_HW = random.integers(0, 3, (3, 4)).repeat(5, axis=0).repeat(5, axis=1).astype(np.uint8)
        truth_HW = small_HW.repeat(2, axis=0).repeat(2, axis=1)
        truth_HW[0, :] = 255  # nobody said what this is
        (folder / f"{n}.png").write_bytes(write_png(truth_HW, PARTS))
        said = json.dumps({"mask": str(folder / f"{n}.png")})
        rows["images"].append({"image_id": image_id(n), "split": "test", "group": f"g{n}"})
        rows["labels"].append(
            {"image_id": image_id(n), "task": "parts", "event": "imported", "origin": "imported", "audit": False}
            | {"value": said}
        )
        for model, share in (("parts@1", 0.4), ("parts@2", 0.1)):
            answer_HW = np.where(random.random(small_HW.shape) < share, random.integers(0, 3, small_HW.shape), small_HW)
            key = {"image_id": image_id(n), "task": "parts", "model": model}
            rows["outcomes"].append({**key, "width": 40, "height": 30})
            rows["segments"] += [
                {**key, "label": PARTS[found.value], "rle": found.rle}
                for found in encode_classes(answer_HW.astype(np.uint8))
            ]
            totals[model] += confusion(truth_HW, answer_HW.repeat(2, axis=0).repeat(2, axis=1), 3, void=255)
    for table, found in rows.items():
        tables.add_rows(table, found)
    workspace.warehouse.registry.promote("parts@1")
    return workspace, totals


def test_masks_are_compared_pixel_by_pixel_at_the_size_of_their_images(tmp_path: Path) -> None:
    workspace, totals = masked(tmp_path, 24)
    found = workspace.evaluate("parts", by=["width"])
    comparison = found.comparison
    assert (comparison.measure, comparison.n, found.candidate) == ("mean_iou", 24, "parts@2")
    assert comparison.baseline is not None
    assert comparison.difference is not None
    for model, measured in (("parts@1", comparison.baseline), ("parts@2", comparison.candidate)):
        expected = segmentation_metrics(totals[model], PARTS, 24)
        assert measured.score.value == pytest.approx(expected["mean_iou"])
        assert {name: each.score for name, each in measured.classes.items()} == pytest.approx(
            {name: each["iou"] for name, each in expected["classes"].items()}
        )
        assert measured.score.low < measured.score.value < measured.score.high
    assert 0.0 < comparison.difference.low < comparison.difference.value < comparison.difference.high
    assert [(each.column, each.value, each.n) for each in found.slices] == [("width", "40", 24)]
    again = workspace.evaluate("parts")
    assert (again.status, again.comparison, again.num_left_out) == ("nothing to do", comparison, 0)
    move = workspace.promote("parts@2")
    assert "mean IoU +" in move.why
    output = (
        CliRunner()
        .invoke(cli, ["--config", str(workspace.config_path), "evaluate", "parts", "--against", "parts@1"])
        .output
    )
    assert "mean IoU of parts@2" in output
    assert "class\timages\tIoU\tchange\tinterval\n" in output


def test_a_mask_that_cannot_be_read_leaves_its_image_out(tmp_path: Path) -> None:
    workspace, _ = masked(tmp_path, 12)
    (tmp_path / "3.png").unlink()
    (tmp_path / "4.png").write_bytes(b"no mask")
    found = workspace.evaluate("parts")
    assert (found.comparison.n, found.num_left_out) == (10, 2)
    assert found.notes == workspace.evaluate("parts").notes
    assert "2 labelled test images are left out" in found.notes[-1]


def test_few_masks_promote_nothing(tmp_path: Path) -> None:
    workspace, _ = masked(tmp_path, 5)
    found = workspace.evaluate("parts")
    assert found.comparison.difference is not None
    assert (found.comparison.difference.low, found.comparison.difference.high) == (-1.0, 1.0)
    assert not found.decision.promote
