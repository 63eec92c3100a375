"""Which calls may share one run."""

from __future__ import annotations

import dataclasses
import json

from winnow.augment import Policy
from winnow.config import PredictConfig
from winnow.images import View
from winnow.models.references import ResolvedModel
from winnow_connectors.ledger import digest_of
from winnow_jobs.spec import PredictSpec, make_spec

MODEL = ResolvedModel(
    id="pets.safetensors#0123456789ab",
    source="checkpoint",
    architecture="torchvision/resnet18",
    weights="pets.safetensors",
    location="/one/pets.safetensors",
    sha256="0123456789ab" + 52 * "0",
    classes=("cat", "dog"),
    view=View(256, (224, 224)),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def digest(model: ResolvedModel = MODEL, *, store_probabilities: bool = False) -> str:
    tasks = {"pets": ("classification", model, store_probabilities)}
    spec = make_spec(PredictConfig(), tasks, batch_size=0, chunk_rows=0, fragment_rows=0, asked={})
    return digest_of(spec.answers_digest_source())


def test_a_model_is_its_content_wherever_the_file_lies() -> None:
    assert digest(dataclasses.replace(MODEL, location="/two/pets.safetensors")) == digest()


def test_images_get_fingerprints_for_embeddings_only() -> None:
    tasks = {"pets": ("classification", MODEL, False)}
    assert not make_spec(PredictConfig(), tasks, batch_size=0, chunk_rows=0, fragment_rows=0, asked={}).fingerprints
    tasks |= {"alike": ("embedding", MODEL, False)}
    assert make_spec(PredictConfig(), tasks, batch_size=0, chunk_rows=0, fragment_rows=0, asked={}).fingerprints


def test_a_mean_over_views_is_another_answerer() -> None:
    policy = Policy("mild", ({"name": "RandomHorizontalFlip"},))
    tasks = {"pets": ("classification", MODEL, False), "alone": ("classification", MODEL, False)}
    specs = [
        make_spec(
            PredictConfig(), tasks, batch_size=0, chunk_rows=0, fragment_rows=0, asked={}, augmented={"pets": augmented}
        )
        for augmented in ((policy, 3), (policy, 4), (dataclasses.replace(policy, seed=1), 3))
    ]
    assert len({spec.model_ids["pets"] for spec in specs}) == 3
    assert specs[0].model_ids == {"alone": MODEL.id, "pets": f"{MODEL.id}+mild.{policy.digest}x3"}
    for spec in specs:
        assert PredictSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_whatever_changes_the_rows_is_another_run() -> None:
    others = [
        digest(store_probabilities=True),
        digest(dataclasses.replace(MODEL, sha256=64 * "1")),
        digest(dataclasses.replace(MODEL, classes=("dog", "cat"))),
        digest(dataclasses.replace(MODEL, view=View(232, (224, 224)))),
        digest(dataclasses.replace(MODEL, mean=(0.4, 0.5, 0.5))),
        digest(dataclasses.replace(MODEL, architecture="torchvision/resnet34")),
    ]
    assert len({digest(), *others}) == 1 + len(others)
