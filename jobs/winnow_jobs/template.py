"""The commented ``winnow.toml`` that ``winnow init`` writes, made from the fields' own descriptions.

``python -m winnow_jobs.template`` prints docs/configuration.md, made from them as well.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from winnow.config import (
    AugmentationConfig,
    IngestConfig,
    PolicyConfig,
    PredictConfig,
    PromotionConfig,
    ReviewConfig,
    SelectConfig,
    SplitsConfig,
    StorageConfig,
    TaskConfig,
    WarehouseConfig,
)
from winnow.errors import CallError

_HEADER = """\
# Winnow's configuration. Every key is listed; those behind a # have their default value.
# Secrets never stand here: they come from the environment or a cloud profile.
"""

_MILD = ({"name": "RandomHorizontalFlip", "p": 0.5}, {"name": "ColorJitter", "brightness": 0.2})
_MIXED = {"margin": 0.5, "diversity": 0.3, "random": 0.2}


def template(*, warehouse: str = "./warehouse", storage: str = "") -> str:
    """Text of a winnow.toml in which every key stands with its description.

    Args:
        warehouse: value of ``warehouse.uri``.
        storage: ready-made ``[storage."…"]`` sections; a commented example when empty.
    """
    parts = [
        _HEADER,
        _section("warehouse", WarehouseConfig, {"uri": warehouse}),
        storage or _section('storage."s3://"', StorageConfig, {}, commented=True),
        _section(
            "tasks.objects", TaskConfig, {"kind": "classification", "model": "torchvision/mobilenet_v2@IMAGENET1K_V1"}
        ),
        _section("augmentations.mild", AugmentationConfig, {"transforms": _MILD}, commented=True),
        _section("ingest", IngestConfig, {}),
        _section("splits", SplitsConfig, {}),
        _section("predict", PredictConfig, {}),
        _section("select", SelectConfig, {}),
        _section("policies.mixed", PolicyConfig, _MIXED, commented=True),
        _section("review", ReviewConfig, {}),
        _section("promotion", PromotionConfig, {}),
    ]
    return "\n".join(parts)


def write_template(path: Path, *, warehouse: str, storage: str = "") -> bool:
    """Write the template; False, and nothing is touched, when the file exists.

    Raises:
        CallError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(template(warehouse=warehouse, storage=storage))
    except FileExistsError:
        return False
    except OSError as error:
        raise CallError(f"{path} cannot be written: {error}; choose another folder with --config") from None
    return True


def _section(name: str, model: type[BaseModel], given: dict[str, Any], *, commented: bool = False) -> str:
    mark = "# " if commented else ""
    lines = [*_comment(" ".join((model.__doc__ or "").split())), f"{mark}[{name}]"]
    for key, field in model.model_fields.items():
        lines += _comment(field.description or "")
        if key in given:
            lines.append(f"{mark}{key} = {_toml(given[key])}")
            continue
        default = field.get_default(call_default_factory=True)
        value = _placeholder(field) if default in (None, PydanticUndefined) else _toml(default)
        lines.append(f"# {key} = {value}")
    return "\n".join(lines) + "\n"


def _placeholder(field: FieldInfo) -> str:
    return _toml(field.examples[0]) if field.examples else '"…"'


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, width=110, initial_indent="# ", subsequent_indent="# ")


def _toml(value: Any) -> str:
    """A TOML literal for a default value: numbers, booleans and strings are as in JSON."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    return json.dumps(value, ensure_ascii=False)


_REFERENCE_HEAD = """\
# Configuration

`winnow.toml` is validated as a whole before anything starts: every fault is named with its key, its value and what is
valid. `winnow init` writes one with every key as a comment. Another file than `./winnow.toml` is named by `--config` or
`WINNOW_CONFIG`. Relative paths inside it start at its own folder.

Secrets never stand in the file:

| for | from the environment | or |
|---|---|---|
| `s3://` | `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` (`AWS_SESSION_TOKEN`) | `profile`, the machine's role |
| `gs://` | `GOOGLE_APPLICATION_CREDENTIALS` (a file) | the machine's role |
| `az://` | `AZURE_STORAGE_ACCOUNT_NAME`, `AZURE_STORAGE_ACCOUNT_KEY` | the machine's role |
| Label Studio | `LABEL_STUDIO_API_KEY`, and its address in `LABEL_STUDIO_URL` | – |

Jobs run on Ray on this machine, or on the cluster that `RAY_ADDRESS` names.
"""


def reference() -> str:
    """All keys as Markdown tables."""
    sections: list[tuple[str, type[BaseModel]]] = [
        ("[warehouse]", WarehouseConfig),
        ('[storage."s3://"]', StorageConfig),
        ("[tasks.NAME]", TaskConfig),
        ("[augmentations.NAME]", AugmentationConfig),
        ("[ingest]", IngestConfig),
        ("[splits]", SplitsConfig),
        ("[predict]", PredictConfig),
        ("[select]", SelectConfig),
        ("[policies.NAME]", PolicyConfig),
        ("[review]", ReviewConfig),
        ("[promotion]", PromotionConfig),
    ]
    parts = [_REFERENCE_HEAD]
    for name, model in sections:
        parts.append(f"\n## `{name}`\n\n{_paragraph(model)}\n\n| key | default | |\n|---|---|---|\n")
        parts += [
            f"| `{key}` | {_shown_default(field)} | {field.description} |\n"
            for key, field in model.model_fields.items()
        ]
    return "".join(parts)


def _paragraph(model: type[BaseModel]) -> str:
    return textwrap.fill(" ".join((model.__doc__ or "").split()), width=120)


def _shown_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "–" if default is None else f"`{_toml(default)}`"


if __name__ == "__main__":
    click.echo(reference(), nl=False)
