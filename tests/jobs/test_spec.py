"""Which calls may share one run."""

from __future__ import annotations

import dataclasses

from winnow.config import PredictConfig
from winnow.images import View
from winnow.models.references import ResolvedModel
from winnow_connectors.ledger import digest_of
from winnow_jobs.spec import make_spec

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
