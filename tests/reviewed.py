"""A workspace with real images and answers made by hand, and the Label Studio that shows them to people."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model

import workspaces as ws
from delta_tables import at
from winnow.masks import encode_classes
from winnow_jobs import Workspace
from winnow_jobs.review import begin_anew, publish
from winnow_jobs.selection import answerer_of

if TYPE_CHECKING:
    from winnow_connectors.label_studio import LabelStudio

TASK = ws.TASK
SECRET = "patient-jones"
WIDTH, HEIGHT = 40, 32
PARTS = ["background", "left", "right"]


def telling_jpeg(number: int) -> bytes:
    """A JPEG that says where and by whom it was taken."""
    exif = Image.Exif()
    exif[0x010F] = "TellingCamera"
    exif[0x013B] = "Jane Jones"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 18.0)})
    sink = io.BytesIO()
    Image.open(io.BytesIO(ws.small_jpeg(number))).save(sink, "JPEG", exif=exif, comment=b"TellingComment")
    return sink.getvalue()


class Reviewed:
    """A workspace whose images are real and whose answers are made by hand, and the Label Studio that shows them.

    Image ``n`` is answered with class ``n % 5``, at a confidence that grows with n.
    """

    size = WIDTH, HEIGHT

    def __init__(self, folder: Path, server: LabelStudio, *, warehouse: str, images: str, storage: str = "") -> None:
        self.server = server
        ws.save_model(folder / "small.safetensors")
        config = ws.write_config(folder, warehouse=warehouse, storage=storage)
        self.workspace = Workspace(config)
        self.workspace.init()
        self.images = self.workspace.stores.at(images)
        self.tables = HandMadeAt(self.workspace)
        self.ids: list[str] = []

    @cached_property
    def model(self) -> str:
        return answerer_of(self.workspace, TASK)

    def add_images(self, images: int | Sequence[bytes]) -> list[str]:
        files = [telling_jpeg(number) for number in range(images)] if isinstance(images, int) else images
        for number, data in enumerate(files):
            self.images.put(f"{SECRET}/{number:04d}.jpg", data)
        self.workspace.ingest([f"{self.images.uri}/"])
        rows = self.workspace.query("SELECT image_id, uri FROM current_images ORDER BY uri").to_pylist()
        self.ids = [row["image_id"] for row in rows]
        return self.ids

    def answer(
        self, *, model: str | None = None, shift: int = 0, minute: int = 0, classes: Sequence[str] | None = None
    ) -> None:
        model = model or self.model
        self.tables.add(
            "predictions",
            [
                {
                    "image_id": image_id, "task": TASK, "model": model, "label": ws.CLASSES[(n + shift) % 5],
                    "confidence": 0.5 + n / 1000, "margin": 0.1, "entropy": 1.0, "top5": [], "at": at(minute),
                    "classes": classes,
                }
                for n, image_id in enumerate(self.ids)
            ],
        )  # fmt: skip
        self.tables.add(
            "outcomes",
            [
                {
                    "image_id": image_id, "task": TASK, "model": model, "status": "answered", "width": self.size[0],
                    "height": self.size[1], "sha256": f"{n:064x}", "format": "JPEG", "at": at(minute),
                }
                for n, image_id in enumerate(self.ids)
            ],
        )  # fmt: skip

    def add_masks(self, labels_hw: Any) -> None:
        """A segmentation task ``parts`` whose model gave this answer to every image."""
        torch.manual_seed(0)
        network = get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=len(PARTS))
        tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(tensors, self.workspace.folder / "parts.safetensors")
        path = self.workspace.config_path
        path.write_text(
            f'{path.read_text()}\n[tasks.parts]\nkind = "segmentation"\nmodel = "./parts.safetensors"\n'
            f'architecture = "torchvision/lraspp_mobilenet_v3_large"\nclasses = {json.dumps(PARTS)}\nsize = 512\n'
        )
        self.workspace = Workspace(path)
        model = answerer_of(self.workspace, "parts")
        self.tables.add(
            "segments",
            [
                {
                    "image_id": image_id, "task": "parts", "model": model, "label": PARTS[item.value], "rle": item.rle,
                    "area_share": 0.3, "confidence": 0.5, "entropy": 0.1, "box": [0.0, 0.0, 1.0, 1.0], "at": at(0),
                }
                for image_id in self.ids
                for item in encode_classes(labels_hw)
            ],
        )  # fmt: skip

    def queue(self, image_ids: Sequence[str], *, task: str = TASK, audit: bool = False) -> None:
        self.tables.add(
            "queue",
            [
                {
                    "image_id": image_id, "task": task, "round": 1, "model": self.model, "rank": rank,
                    "reason": "audit" if audit else "margin", "policy": "mine", "audit": audit, "at": at(0),
                }
                for rank, image_id in enumerate(image_ids, start=1)
            ],
        )  # fmt: skip

    def push(self) -> Any:
        (result,) = self.workspace.push(task=TASK)
        return result

    def pull(self) -> Any:
        (result,) = self.workspace.pull(task=TASK)
        return result

    def tasks(self, project: int) -> dict[str, Any]:
        """The tasks of a project as annotators' browsers get them, by image."""
        answer = self.server._api.get("/api/tasks/", project=project, fields="all", page_size=10_000)
        return {task["data"]["image_id"]: task for task in answer["tasks"]}

    def annotate(self, project: int, image_id: str, result: list[Any], **more: Any) -> int:
        body = {"result": result, "lead_time": 4.0, **more}
        task_id = self.tasks(project)[image_id]["id"]
        return int(self.server._api.post(f"/api/tasks/{task_id}/annotations/", body)["id"])

    def labels(self, order: str = "updated_at, annotation_id") -> list[dict[str, Any]]:
        rows = self.workspace.query(f"SELECT * FROM labels WHERE origin = 'label_studio' ORDER BY {order}").to_pylist()
        return [dict(row, number=self.ids.index(row["image_id"])) for row in rows]

    def current(self) -> dict[int, str | None]:
        rows = self.workspace.query(f"SELECT image_id, label FROM current_labels WHERE task = '{TASK}'").to_pylist()
        return {self.ids.index(row["image_id"]): row["label"] for row in rows}


class HandMadeAt:
    """Adds rows to the tables of a workspace, wherever they are."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._number = 0

    def add(self, table: str, rows: list[dict[str, Any]]) -> None:
        self._number += 1
        numbers = begin_anew(self._workspace, "hand")
        publish(self._workspace, "hand", numbers, {"number": self._number}, {table: rows}, {"tasks": [TASK]})
