"""``winnow select`` over tables made by hand: who is chosen and why, never twice; killed, stopped and run again."""

from __future__ import annotations

import hashlib
import json
import signal
import tempfile
import threading
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import winnow_jobs.selection as job
import workspaces as ws
from delta_tables import HandMade, at
from winnow.errors import CallError, OpenRunError
from winnow.splits import audit_positions
from winnow_jobs import Workspace, candidates
from winnow_jobs.cli.main import cli
from winnow_jobs.spec import answerer, views_of

TASK = ws.TASK
ALIKE = """
[tasks.alike]
kind = "embedding"
model = "./small.safetensors"
architecture = "timm/test_resnet"
"""
PARTS = """
[tasks.parts]
kind = "segmentation"
model = "./masks.safetensors"
architecture = "torchvision/lraspp_mobilenet_v3_large"
classes = ["background", "left", "right"]
"""
ONE_POLICY = """
[select]
policy = "mine"
audit_share = {audit}
[policies.mine]
{shares}
"""


def image_id(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


NUMBERS = {image_id(number): number for number in range(2000)}


@cache
def _checkpoints() -> dict[str, bytes]:
    """Small networks with random weights, by file name."""
    import torch
    from safetensors.torch import save
    from torchvision.models import get_model

    torch.manual_seed(0)
    network = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=3)
    with tempfile.TemporaryDirectory() as folder:
        small = ws.save_model(Path(folder, "small.safetensors")).read_bytes()
    masks = save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    return {"small.safetensors": small, "masks.safetensors": masks}


class Made:
    """A workspace whose tables are filled by hand. Images are numbers from 0 on."""

    def __init__(self, folder: Path, sections: str = "", *, audit: float = 0.0, **shares: float) -> None:
        for name, data in _checkpoints().items():
            (folder / name).write_bytes(data)
        config = ws.write_config(folder)
        if shares:
            listed = "\n".join(f"{name} = {share}" for name, share in shares.items())
            sections += ONE_POLICY.format(audit=audit, shares=listed)
        config.write_text(config.read_text() + sections)
        self.workspace = Workspace(config)
        self.workspace.init()
        self.tables = HandMade(folder / "warehouse" / "tables", exist=True)
        self._models: dict[str, str] = {}

    def model(self, task: str = TASK) -> str:
        if task not in self._models:
            model = self.workspace.task_model(task)
            self._models[task] = answerer(model, views_of(self.workspace.config, task, model))
        return self._models[task]

    def images(self, num: int, *, start: int = 0, **columns: dict[int, Any]) -> None:
        """Images in a group of their own, with the columns given by number where they differ from the default."""
        self.tables.add_rows(
            "images",
            (
                {"image_id": image_id(number), "group": image_id(number)}
                | {name: values[number] for name, values in columns.items() if number in values}
                for number in range(start, start + num)
            ),
        )

    def predictions(self, margins: Any, *, start: int = 0, **more: Any) -> None:
        """One prediction per image, of class cat unless ``label`` says otherwise; ``more`` are columns."""
        labels = more.pop("label", {})
        self.tables.add_rows(
            "predictions",
            (
                {"task": TASK, "model": self.model(), "image_id": image_id(start + place), "margin": float(margin)}
                | {"label": labels.get(start + place, "cat"), "confidence": 0.5 + float(margin) / 2}
                | {"entropy": 1.0 - float(margin), **more}
                for place, margin in enumerate(margins)
            ),
        )

    def vectors(self, vectors_ND: Any, *, start: int = 0) -> None:
        self.tables.add_rows(
            "embeddings",
            (
                {"image_id": image_id(start + place), "vector": vector, "model": self.model("alike")}
                for place, vector in enumerate(np.asarray(vectors_ND, dtype=np.float32).tolist())
            ),
        )

    def outcomes(self, **columns: dict[int, str]) -> None:
        """What is known of the bytes and pixels of images."""
        numbers = sorted({number for values in columns.values() for number in values})
        self.tables.add_rows(
            "outcomes",
            (
                {"image_id": image_id(number), "task": TASK, "model": self.model()}
                | {name: values.get(number) for name, values in columns.items()}
                for number in numbers
            ),
        )

    def queue(self, run: str | None = None) -> list[dict[str, Any]]:
        """The queue in order, with the number of each image."""
        where = f"WHERE run = '{run}'" if run else ""
        rows = self.workspace.query(f"SELECT * FROM queue {where} ORDER BY round, audit, rank").to_pylist()
        return [row | {"number": NUMBERS[row["image_id"]]} for row in rows]

    def chosen(self, *, audit: bool = False) -> list[int]:
        return [row["number"] for row in self.queue() if row["audit"] == audit]


def spread(num: int, dimensions: int = 96, seed: int = 0) -> np.ndarray:
    """Vectors of which no two are alike."""
    vectors = np.random.default_rng(seed).standard_normal((num, dimensions))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def near(vector: np.ndarray, cosine: float, seed: int = 1) -> np.ndarray:
    """A vector that has this cosine with another one."""
    other = np.random.default_rng(seed).standard_normal(len(vector))
    other -= (other @ vector) * vector
    return np.asarray(cosine * vector + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other))


def test_the_least_sure_come_first_and_every_row_says_why(tmp_path: Path) -> None:
    made = Made(tmp_path, margin=1.0)
    made.images(20)
    margins = np.random.default_rng(0).permutation(20) / 20
    made.predictions(margins)
    result = made.workspace.select(5)
    rows = made.queue()
    assert [row["number"] for row in rows] == np.argsort(margins)[:5].tolist()
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["score"] for row in rows] == pytest.approx(1 - np.sort(margins)[:5], abs=1e-6)
    (same,) = {(r["reason"], r["policy"], r["round"], r["model"], r["run"], r["audit"], r["task"]) for r in rows}
    assert same == ("margin", "mine", 1, made.model(), result.run_id, False, TASK)
    assert (result.status, result.num_chosen, result.num_candidates, result.round) == ("finished", 5, 20, 1)
    (run,) = made.workspace.query("SELECT * FROM runs WHERE job = 'select'").to_pylist()
    assert (run["tasks"], dict(run["counts"])["margin"], run["peak_memory_bytes"] > 0) == ([TASK], 5, True)


def test_only_current_originals_of_the_train_split_that_nobody_has_seen_are_chosen(tmp_path: Path) -> None:
    made = Made(tmp_path, margin=1.0)
    made.images(
        30, split={1: "val", 2: "test", 3: "train"}, audit={4: True}, parent={5: image_id(0)},
    )  # fmt: skip
    made.predictions(np.linspace(0, 0.9, 30))
    made.images(1, start=6, event={6: "vanished"}, seen_at={6: at(5)})
    made.tables.add("labels", task=TASK, image_id=image_id(7), label="cat", origin="imported", event="imported")
    made.tables.add("labels", task=TASK, image_id=image_id(8), label=None)  # somebody was unsure
    made.tables.add("labels", task="other", image_id=image_id(9), label="cat")
    made.tables.add("queue", task=TASK, image_id=image_id(10))  # waits
    made.tables.add("queue", task=TASK, image_id=image_id(11))  # was skipped
    made.tables.add("labels", task=TASK, image_id=image_id(11), event="skipped")
    made.tables.add("queue", task=TASK, image_id=image_id(12), run="abandoned")
    made.images(1, start=40)  # not predicted
    result = made.workspace.select(100)
    assert sorted(row["number"] for row in made.queue(result.run_id)) == [0, 3, 9, *range(12, 30)]
    assert "79 fewer than the budget" in result.verdict


def test_a_later_round_goes_on_and_chooses_nobody_twice(tmp_path: Path) -> None:
    made = Made(tmp_path, audit=0.2, margin=0.5, random=0.5)
    made.images(40, audit=dict.fromkeys(range(30, 40), True))
    made.predictions(np.linspace(0, 0.9, 40))
    results = [made.workspace.select(15) for _ in range(4)]
    rows = made.queue()
    assert [result.num_chosen for result in results] == [15, 15, 9, 1]
    assert len({row["image_id"] for row in rows}) == len(rows) == 40
    assert Counter(row["round"] for row in rows) == {1: 15, 2: 15, 3: 9, 4: 1}
    assert made.workspace.select(15).status == "nothing to do"
    assert ws.one(made.workspace, "SELECT count(*) AS n FROM runs WHERE job = 'select'") == {"n": 4}


def test_the_seed_decides_what_is_random_and_nothing_else_does(tmp_path: Path) -> None:
    picks = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        other = Made(folder, margin=0.5, random=0.5)
        # Rows in another order, and in two files: only what they say matters.
        for start in (30, 0):
            other.images(30, start=start)
            other.predictions(np.zeros(30), start=start)
        other.workspace.select(10, seed=seed)
        picks.append([(row["number"], row["reason"], row["score"]) for row in other.queue()])
    assert picks[0] == picks[1] != picks[2]
    assert [score for _, reason, score in picks[0] if reason == "random"] == [None] * 5


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    made = Made(tmp_path, margin=1.0)
    made.images(5)
    made.predictions(np.linspace(0, 0.9, 5))
    result = made.workspace.select(3, dry_run=True)
    assert (result.num_chosen, result.run_id, result.round) == (3, None, None)
    assert made.queue() == []
    assert made.workspace.warehouse.ledger.last_claim(f"select-{TASK}") is None


def test_audit_images_come_in_the_order_of_their_hashes_and_are_shown_in_a_random_one(tmp_path: Path) -> None:
    made = Made(tmp_path, audit=0.5, margin=1.0)
    made.images(60, audit=dict.fromkeys(range(30, 60), True), split={30: "val", 31: "test"}, parent={32: image_id(0)})
    made.predictions(np.linspace(0, 0.9, 60))
    made.tables.add("labels", task=TASK, image_id=image_id(33), label="cat", origin="imported", event="imported")
    reserve = [number for number in range(30, 60) if number not in (32, 33)]
    reserve.sort(key=lambda number: audit_positions([image_id(number)])[0])
    first = made.workspace.select(20)
    rows = [row for row in made.queue() if row["audit"]]
    assert {row["number"] for row in rows} == set(reserve[:10])
    assert [row["number"] for row in rows] != reserve[:10]
    assert [row["rank"] for row in rows] == list(range(1, 11))
    assert {(row["reason"], row["score"]) for row in rows} == {("audit", None)}
    assert (first.num_audit, first.num_chosen, made.chosen()) == (10, 20, list(range(10)))
    made.workspace.select(20)
    assert set(made.chosen(audit=True)) == set(reserve[:20])
    last = made.workspace.select(20)  # eight are left: the policy gets the others' share
    assert (last.num_audit, last.num_chosen) == (8, 18)
    assert "the audit reserve has 2 images too few" in last.verdict
    assert sorted(made.chosen()) == list(range(30))


def test_a_call_may_ask_for_an_audit_alone_or_for_none(tmp_path: Path) -> None:
    made = Made(tmp_path, audit=0.5, margin=1.0)
    made.images(30, audit=dict.fromkeys(range(20, 30), True))
    made.predictions(np.linspace(0, 0.9, 30))
    none = made.workspace.select(4, audit_share=0.0)
    assert (none.num_audit, none.num_chosen) == (0, 4)
    alone = made.workspace.select(6, audit_share=1.0)
    assert (alone.num_audit, alone.num_chosen) == (6, 6)
    short = made.workspace.select(6, audit_share=1.0)
    assert (short.num_audit, short.num_chosen) == (4, 4)
    assert "the audit reserve has 2 images too few" in short.verdict
    assert made.workspace.select(6, audit_share=1.0).status == "nothing to do"
    with pytest.raises(CallError, match=r"--audit-share 1\.5 is not valid; give a number from 0 to 1"):
        made.workspace.select(6, audit_share=1.5)


def test_what_shows_the_same_as_something_known_or_chosen_is_passed_over(tmp_path: Path) -> None:
    made = Made(tmp_path, ALIKE, margin=1.0)
    made.images(24, split={20: "val"}, audit={22: True})
    made.predictions(np.linspace(0, 0.9, 24))
    vectors = spread(24)
    vectors[1] = near(vectors[0], 0.97)  # of a chosen one
    vectors[3] = near(vectors[2], 0.8)  # by its perceptual hash
    vectors[5] = near(vectors[4], 0.9)  # by nothing
    vectors[10] = near(vectors[11], 0.97)  # of one that is labelled
    vectors[12] = near(vectors[13], 0.97)  # of one that waits
    vectors[14] = near(vectors[20], 0.97)  # of a labelled one in val
    vectors[16] = near(vectors[22], 0.97)  # of a labelled one of the audit reserve, which no policy looks at
    has_vector = [*range(6), *range(8, 18), *range(20, 24)]
    for number in has_vector:
        made.vectors(vectors[number : number + 1], start=number)
    made.outcomes(
        sha256={6: "same", 7: "same", 17: "moved"},
        pixel_hash={8: "pixels", 9: "pixels"},
        phash={2: "c3a5c3a5c3a5c3a5", 3: "c3a5c3a5c3a5c3a6"},
    )
    for number in (11, 20, 22):
        made.tables.add("labels", task=TASK, image_id=image_id(number), label="cat")
    made.tables.add("queue", task=TASK, image_id=image_id(13))
    # An image that was labelled and then moved: the old one is gone, its bytes are known.
    made.images(1, start=40, event={40: "vanished"})
    made.tables.add("labels", task=TASK, image_id=image_id(40), label="cat")
    made.outcomes(sha256={40: "moved"})
    result = made.workspace.select(100)
    passed = {1, 3, 7, 9, 10, 12, 14, 17}
    assert [row["number"] for row in made.queue(result.run_id)] == [
        number for number in range(24) if number not in passed | {11, 13, 20, 22}
    ]
    assert result.num_repeats == len(passed)


def test_diversity_goes_furthest_from_all_that_people_know(tmp_path: Path) -> None:
    made = Made(tmp_path, ALIKE, diversity=1.0)
    made.images(300, split={299: "val"})
    made.predictions(np.zeros(300))
    vectors = spread(300, dimensions=6)
    made.vectors(vectors[:290])
    made.vectors(vectors[299:], start=299)
    for number in (7, 299):
        made.tables.add("labels", task=TASK, image_id=image_id(number), label="cat")
    made.tables.add("queue", task=TASK, image_id=image_id(8))
    result = made.workspace.select(20)
    centers = [vectors[7], vectors[8]]
    for row in made.queue(result.run_id):
        distances = 1 - (vectors[:290] @ np.transpose(centers)).max(axis=1)
        assert distances[row["number"]] == pytest.approx(distances.max(), abs=1e-5)
        assert row["score"] == pytest.approx(distances.max(), abs=1e-5)
        assert row["reason"] == "diversity"
        centers.append(vectors[row["number"]])
    assert result.num_chosen == 20
    assert "only 288 candidates have a vector" in result.verdict


def test_more_vectors_than_memory_is_kept_for_give_the_same_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path, ALIKE, diversity=1.0)
    made.images(100)
    made.predictions(np.zeros(100))
    vectors = spread(100, dimensions=6)
    made.vectors(vectors)
    monkeypatch.setattr(candidates, "_IN_MEMORY_BYTES", 0)
    made.workspace.select(10)
    chosen = made.chosen()
    for place in range(1, 10):
        distances = 1 - (vectors @ vectors[chosen[:place]].T).max(axis=1)
        assert distances[chosen[place]] == pytest.approx(distances.max(), abs=1e-5)


def test_answers_of_a_mean_over_views_are_looked_at_when_the_task_has_one(tmp_path: Path) -> None:
    mild = '[augmentations.mild]\ntransforms = [{ name = "RandomHorizontalFlip" }]\n'
    made = Made(tmp_path, ALIKE + 'augmentation = "mild"\n' + mild, diversity=1.0)
    assert made.model("alike") != made.workspace.task_model("alike").id
    made.images(5)
    made.predictions(np.zeros(5))
    made.vectors(spread(5))
    assert made.workspace.select(3).num_chosen == 3


def test_class_balance_asks_for_what_people_have_seen_least(tmp_path: Path) -> None:
    made = Made(tmp_path, class_balance=1.0)
    made.images(60)
    labels = {number: ["cat", "dog", "eel"][number % 3] for number in range(60)}
    made.predictions(np.zeros(60), label=labels)
    for number in (0, 3, 6):  # three cats, one of which a person called a bee
        made.tables.add("labels", task=TASK, image_id=image_id(number), label="bee" if number == 6 else "cat")
    made.tables.add("queue", task=TASK, image_id=image_id(1))  # a dog waits
    result = made.workspace.select(9)
    rows = made.queue(result.run_id)
    counts = Counter({"cat": 2, "dog": 1})
    for row in rows:
        name = labels[row["number"]]
        fewest = min(counts[each] for each in ("cat", "dog", "eel"))
        assert counts[name] == fewest
        assert row["score"] == pytest.approx(1 / (1 + fewest))
        counts[name] += 1
    assert counts == {"cat": 4, "dog": 4, "eel": 4}


def test_masks_are_judged_by_the_mean_over_their_pixels(tmp_path: Path) -> None:
    made = Made(tmp_path, PARTS, entropy=1.0)
    made.images(40)
    rng = np.random.default_rng(0)
    expected = np.zeros(40)
    rows = []
    for number in range(40):
        shares = rng.dirichlet(np.ones(3))
        for name, share, entropy in zip(("background", "left", "right"), shares, rng.random(3), strict=True):
            expected[number] += share * entropy
            rows.append(
                {"image_id": image_id(number), "task": "parts", "model": made.model("parts"), "label": name}
                | {"area_share": share, "entropy": entropy, "rle": {"size": [1, 1], "counts": "01"}}
            )
    made.tables.add_rows("segments", rows)
    made.workspace.select(10, task="parts")
    found = made.queue()
    assert [row["number"] for row in found] == np.argsort(-expected)[:10].tolist()
    assert [row["score"] for row in found] == pytest.approx(np.sort(expected)[::-1][:10], abs=1e-5)


def test_the_class_of_a_mask_is_the_rarest_that_it_shows(tmp_path: Path) -> None:
    made = Made(tmp_path, PARTS, class_balance=1.0)
    made.images(20)
    shown = {number: ["background", *["left"] * (number < 8), *["right"] * (number < 2)] for number in range(20)}
    made.tables.add_rows(
        "segments",
        (
            {"image_id": image_id(number), "task": "parts", "model": made.model("parts"), "label": name}
            | {"rle": {"size": [1, 1], "counts": "01"}}
            for number, names in shown.items()
            for name in names
        ),
    )
    made.workspace.select(6, task="parts")
    assert Counter(shown[number][-1] for number in made.chosen()) == {"right": 2, "left": 2, "background": 2}


def test_only_the_newest_answers_of_the_model_that_answers_now_count(tmp_path: Path) -> None:
    made = Made(tmp_path, margin=1.0)
    made.images(6)
    made.predictions([0.5, 0.4, 0.3], start=0)
    made.tables.run("r2", finished=2)
    made.tables.run("open", finished=3, status="abandoned")
    for run, number, margin in (("r2", 0, 0.1), ("open", 1, 0.0)):
        made.predictions([margin], start=number, run=run)
    made.predictions([0.0, 0.0, 0.0], start=3, model="another")
    made.workspace.select(10)
    assert [(row["number"], round(1 - row["score"], 3)) for row in made.queue()] == [(0, 0.1), (2, 0.3), (1, 0.4)]


def test_disagreement_passes_over_images_without_augmented_views(tmp_path: Path) -> None:
    made = Made(tmp_path, disagreement=1.0)
    made.images(4)
    made.predictions([0.5, 0.5], disagreement=0.2)
    made.predictions([0.5, 0.5], start=2)
    made.workspace.select(10)
    assert sorted(made.chosen()) == [0, 1]


MANY_ALIKE = ALIKE + ALIKE.replace("alike", "alike_too")


@pytest.mark.parametrize(
    ("sections", "shares", "options", "says"),
    [
        ("", {"margin": 1.0}, {"budget": 0}, "--budget 0 is not valid"),
        ("", {"margin": 1.0}, {"seed": -1}, "--seed -1 is not valid"),
        ("", {"margin": 1.0}, {"task": "other"}, "task 'other' is unknown"),
        ("", {"margin": 1.0}, {"policy": "yours"}, "policy 'yours' is unknown; configured policies: default, mine"),
        (ALIKE, {"margin": 1.0}, {"task": "alike"}, "people are asked about classes and masks only"),
        (PARTS, {"margin": 1.0}, {}, "choose one with --task: objects, parts"),
        (PARTS, {"margin": 1.0}, {"task": "parts"}, "wants margin, which masks do not have"),
        ("", {"diversity": 1.0}, {}, "wants diversity, which needs vectors, and no embedding task is configured"),
        (MANY_ALIKE, {"diversity": 1.0}, {}, "name one as embedding in .select. of winnow.toml: alike, alike_too"),
        (ALIKE, {"diversity": 1.0}, {}, "has no vectors by .* yet; run `winnow predict --task alike`"),
        (PARTS, {"random": 1.0}, {"task": "parts"}, "has no answers by .* yet; run `winnow predict --task parts`"),
        ("", {"disagreement": 1.0}, {}, "without augmented views; set augmentation in .tasks.objects."),
    ],
)
def test_a_wrong_call_says_what_is_valid(
    tmp_path: Path, sections: str, shares: dict[str, float], options: dict[str, Any], says: str
) -> None:
    made = Made(tmp_path, sections, **shares)
    made.images(3)
    made.predictions([0.1, 0.2, 0.3])
    with pytest.raises(CallError, match=says):
        made.workspace.select(**{"budget": 2, **options})
    assert made.workspace.warehouse.ledger.open_runs() == []


def test_without_vectors_other_policies_choose_all_the_same(tmp_path: Path) -> None:
    made = Made(tmp_path, ALIKE, margin=1.0)
    made.images(3)
    made.predictions([0.1, 0.2, 0.3])
    assert made.workspace.select(2).num_chosen == 2


# ------------------------------------------------------------------------------------------- stopped, killed, run again


class Died(BaseException):
    pass


def test_a_run_that_died_after_its_claim_is_finished_by_the_same_call_or_by_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path, margin=1.0)
    made.images(20)
    made.predictions(np.linspace(0, 0.9, 20))

    def die(*_: object) -> None:
        raise Died

    for again in (lambda run_id: made.workspace.select(5), made.workspace.resume):
        with monkeypatch.context() as patch:
            patch.setattr(job, "_publish", die)
            with pytest.raises(Died):
                made.workspace.select(5)
        (run,) = made.workspace.warehouse.ledger.open_runs()
        with pytest.raises(OpenRunError, match="runs resume"):
            made.workspace.select(6)
        result: Any = again(run.run_id)
        assert (result.run_id, result.num_chosen) == (run.run_id, 5)
        assert made.workspace.warehouse.ledger.open_runs() == []
    assert made.chosen() == list(range(10))


def test_a_run_that_was_stopped_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(tmp_path, margin=1.0)
    made.images(20)
    made.predictions(np.linspace(0, 0.9, 20))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "_publish", stop)
        with pytest.raises(KeyboardInterrupt):
            made.workspace.select(5)
    assert made.workspace.warehouse.ledger.open_runs() == []
    assert made.workspace.select(6).num_chosen == 6


def test_two_selections_at_once_choose_nobody_twice(tmp_path: Path) -> None:
    made = Made(tmp_path, margin=0.5, random=0.5)
    made.images(100)
    made.predictions(np.linspace(0, 0.9, 100))
    failed: list[BaseException] = []

    def call(seed: int) -> None:
        try:
            for _ in range(2):
                Workspace(made.workspace.config_path).select(10, seed=seed)
        except OpenRunError:
            pass  # the other one was publishing at that moment
        except BaseException as error:  # noqa: BLE001  shown by the test's thread
            failed.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in (0, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not failed
    rows = made.queue()
    assert len({row["image_id"] for row in rows}) == len(rows)
    assert set(Counter(row["round"] for row in rows).values()) == {10}
    assert set(Counter(row["run"] for row in rows).values()) == {10}
    assert made.workspace.warehouse.ledger.open_runs() == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_stopped_at_any_moment_nothing_is_lost_or_doubled(tmp_path: Path, how: signal.Signals) -> None:
    made = Made(tmp_path, margin=0.5, random=0.5)
    made.images(1000)
    made.predictions(np.linspace(0, 0.9, 1000))
    log = tmp_path / "log.txt"

    def num_reads() -> int:
        return log.read_text().count("candidates") if log.exists() else 0

    def num_claims() -> int:
        return sum(1 for _ in made.workspace.warehouse.store.list("claims/"))

    for moments in (num_reads, num_claims):
        before = moments()
        process = ws.start(made.workspace.config_path, "select", "--budget", "50", log=log)
        try:
            while moments() == before and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(how)
            code = process.wait(60)
        finally:
            ws.kill_all_started()
        assert code in ((-9, 0) if how == signal.SIGKILL else (130, 0)), log.read_text()[-3000:]
    assert "Traceback" not in log.read_text()
    made.workspace.select(50)
    rows = made.queue()
    assert len({row["image_id"] for row in rows}) == len(rows)
    assert set(Counter(row["round"] for row in rows).values()) == {50}
    assert made.workspace.warehouse.ledger.open_runs() == []


# ---------------------------------------------------------------------------------------------------- the command line


def test_the_command_counts_for_people_and_for_machines(tmp_path: Path) -> None:
    made = Made(tmp_path, audit=0.25, margin=0.7, random=0.3)
    made.images(30, audit={3: True})
    made.predictions(np.linspace(0, 0.9, 30))

    def call(*arguments: str) -> str:
        done = CliRunner().invoke(cli, ["--config", str(made.workspace.config_path), "select", *arguments])
        assert done.exception is None, done.output
        return done.stdout

    lines = [line.split() for line in call("--budget", "12", "--dry-run").splitlines()]
    assert [line for line in lines if "by" in line or "audit" in line][:3] == [
        ["by", "margin", "8"], ["by", "random", "3"], ["for", "the", "audit", "1"],
    ]  # fmt: skip
    assert "dry run, nothing is written" in call("--budget", "12", "--dry-run")
    assert json.loads(call("--budget", "3", "--audit-share", "1", "--dry-run", "--json"))["num_chosen"] == 1
    told = json.loads(call("--budget", "12", "--json"))
    assert (told["num_chosen"], told["reasons"], told["round"]) == (12, {"margin": 8, "random": 3}, 1)
    assert "round 2: 12 of 18 candidates" in call("--budget", "12")
    call("--budget", "12")
    assert call("--budget", "12").startswith("nothing to do")
    waiting = made.workspace.query("SELECT count(*) AS n FROM queue_waiting").to_pylist()
    assert waiting == [{"n": 30}]
