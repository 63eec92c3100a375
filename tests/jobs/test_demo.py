"""The demo: its annotator on a real Label Studio, a tour that goes on where it was stopped, own images, the loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

import workspaces as ws
from winnow.mask_files import read_label
from winnow_connectors.label_config import label_config
from winnow_connectors.label_tasks import read_class, read_masks
from winnow_jobs import Workspace
from winnow_jobs.cli.main import cli
from winnow_jobs.demo.annotator import answer_all, answer_to, wait_for_person
from winnow_jobs.demo.loop import FLAW, WHERE, Sizes, play
from winnow_jobs.demo.surfaces import CLASSES, MASK_CLASSES, SIDE, describe, mask_of, number_of
from winnow_jobs.demo.tour import Act, Tour
from winnow_jobs.local_label_studio import LocalLabelStudio
from winnow_jobs.local_s3 import LocalS3

if TYPE_CHECKING:
    from winnow_connectors.label_studio import LabelStudio

SURFACES = {f"{number:032x}": describe(number) for number in range(12)}


@pytest.mark.parametrize("number", range(8))
def test_what_the_annotator_says_is_what_was_drawn(number: int) -> None:
    surface = describe(number)
    assert read_class(answer_to(surface, "classification"), shown=None).label == surface.label
    said = read_masks(answer_to(surface, "segmentation"), MASK_CLASSES, width=SIDE, height=SIDE, shown=None)
    assert said.value is not None
    painted_HW = read_label(said.value, MASK_CLASSES, width=SIDE, height=SIDE, read=lambda uri: b"")
    assert np.array_equal(painted_HW, mask_of(surface))


@pytest.mark.label_studio
@pytest.mark.timeout(1200)
def test_the_annotator_answers_through_the_server_what_is_still_open(label_studio: LabelStudio) -> None:
    project = label_studio.create_project(
        "demo: review", config=label_config("classification", CLASSES), instructions="", in_order=False
    ).project_id
    tasks = [{"data": {"image": "s3://nowhere/1.jpg", "image_id": image_id, "round": 1}} for image_id in SURFACES]
    numbers = label_studio.import_tasks(project, json.dumps(tasks).encode())
    first = next(iter(SURFACES))
    label_studio.annotate(numbers[0], answer_to(SURFACES[first], "classification"))
    told: list[tuple[int, int]] = []
    assert answer_all(label_studio, project, "classification", SURFACES, on_answer=lambda *at: told.append(at)) == 11
    assert told == [(number, 11) for number in range(1, 12)]
    assert answer_all(label_studio, project, "classification", SURFACES) == 0
    assert wait_for_person(label_studio, [project]) == 12
    said = {
        task.data["image_id"]: [read_class(each["result"], shown=None).label for each in task.annotations]
        for task in label_studio.changed_tasks(project, None)
    }
    assert said == {image_id: [surface.label] for image_id, surface in SURFACES.items()}


def test_a_tour_that_was_stopped_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    played: list[str] = []
    broken = True

    def step(name: str) -> Iterator[str]:
        played.append(name)
        yield f"$ winnow {name}"
        if name == "b" and broken:
            raise KeyboardInterrupt
        yield f"{name} was done"

    acts = [Act("letters", [lambda: step("a"), lambda: step("b")]), Act("more", [lambda: step("c")])]
    file = tmp_path / "new" / "demo.json"
    with pytest.raises(KeyboardInterrupt):
        Tour(file).play(acts)
    assert played == ["a", "b"]
    broken = False
    assert not Tour(file).is_over(acts)
    Tour(file).play(acts, first=6)
    assert played == ["a", "b", "b", "c"]
    said = capsys.readouterr().out
    assert "7 · more\n$ winnow c\n  c was done\n" in said
    assert Tour(file).is_over(acts)
    Tour(file).play(acts)
    assert played == ["a", "b", "b", "c"]
    assert capsys.readouterr().out == "1 · letters: done before\n2 · more: done before\n"


def test_help_says_what_the_demo_does() -> None:
    said = CliRunner().invoke(cli, ["demo", "--help"])
    assert said.exit_code == 0
    assert "DEMO_HUMAN=1" in said.output
    assert "--images" in said.output


@pytest.mark.ray
@pytest.mark.usefixtures("cached_weights", "ray_session")
def test_own_images_get_the_first_act_alone(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "one.jpg").write_bytes(ws.small_jpeg(1))
    done = CliRunner().invoke(
        cli, ["demo", "--images", str(images), "--folder", str(tmp_path / "own")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "one.jpg" in done.output
    assert "4 · the results" in done.output
    assert "surfaces" not in done.output
    assert not (tmp_path / "own" / "surfaces").exists()


SMALL = Sizes(
    first=110, later=10, seed_labels=24, seed_masks=12, measure_masks=12, budget=12, masks=4, audit=6, audit_share=0.15
)


@pytest.fixture
def folder(tmp_path: Path, label_studio_server: LocalLabelStudio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A workspace whose Label Studio is installed already, and whose servers end with the test."""
    home = tmp_path / ".winnow" / "services"
    shutil.copytree(label_studio_server.environment.parent / "blank", home)
    (home / "label-studio.json").unlink()
    (home / "label-studio-env").symlink_to(label_studio_server.environment)
    for name in ("URL", "API_KEY", "LOCAL_FILES_DOCUMENT_ROOT"):  # the demo sets them
        monkeypatch.setenv(f"LABEL_STUDIO_{name}", "")
    yield tmp_path
    LocalLabelStudio(home).kill9()
    LocalS3(home).kill9()


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.label_studio
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("cached_weights", "ray_session")
def test_the_loop_ends_with_better_models_and_a_look_at_the_audit(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(folder, human=False, sizes=SMALL)
    said = capsys.readouterr().out
    workspace = Workspace(folder / "winnow.toml")
    taught = [version.metrics["train"]["n"] for version in reversed(workspace.models(FLAW))]
    assert taught[0] == 24
    assert taught == sorted(set(taught))
    assert len(taught) == 3
    assert [version.metrics["train"]["n"] for version in workspace.models(WHERE)] == [16, 12]
    labels = workspace.query(
        "SELECT l.label, i.uri, i.audit FROM current_labels AS l JOIN current_images AS i USING (image_id) "
        f"WHERE l.task = '{FLAW}'"
    ).to_pylist()
    assert all(row["label"] == describe(number_of(row["uri"])).label for row in labels)
    assert sum(row["audit"] for row in labels) == SMALL.audit
    runs = workspace.runs()
    assert set(runs["status"].to_pylist()) == {"finished"}
    assert "the simulated annotator" in said
    assert f"{WHERE}@1" in said
    play(folder, human=False, sizes=SMALL)
    again = capsys.readouterr().out
    assert "nothing to do: every act was played before" in again
    assert again.partition("What was learned")[2] == said.partition("What was learned")[2]
    assert Workspace(folder / "winnow.toml").runs().num_rows == runs.num_rows
