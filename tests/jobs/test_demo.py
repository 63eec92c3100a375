"""The demo: its annotator on a real Label Studio, a tour that goes on where it was stopped, own images."""

from __future__ import annotations

import json
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
from winnow_jobs.cli.main import cli
from winnow_jobs.demo.annotator import answer_all, answer_to, wait_for_person
from winnow_jobs.demo.surfaces import CLASSES, MASK_CLASSES, SIDE, describe, mask_of
from winnow_jobs.demo.tour import Act, Tour

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
    assert Tour(file).play(acts, first=6)
    assert played == ["a", "b", "b", "c"]
    said = capsys.readouterr().out
    assert "7 · more\n$ winnow c\n  c was done\n" in said
    assert not Tour(file).play(acts)
    assert played == ["a", "b", "b", "c"]
    assert capsys.readouterr().out == "1 · letters: done before\n2 · more: done before\n"


def test_help_says_what_the_demo_does() -> None:
    said = CliRunner().invoke(cli, ["demo", "--help"])
    assert said.exit_code == 0
    assert "DEMO_HUMAN=1" in said.output
    assert "--images" in said.output


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session", "torch_home")
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
