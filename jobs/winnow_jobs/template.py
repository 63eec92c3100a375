"""The commented ``winnow.toml`` that ``winnow init`` writes: made from the fields' own descriptions."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from winnow.config import IngestConfig, PredictConfig, SplitsConfig, StorageConfig, TaskConfig, WarehouseConfig
from winnow.errors import CallError

_HEADER = """\
# Winnow's configuration. Every key is listed; those behind a # have their default value.
# Secrets never stand here: they come from the environment or a cloud profile.
"""


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
        _section("ingest", IngestConfig, {}),
        _section("splits", SplitsConfig, {}),
        _section("predict", PredictConfig, {}),
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
        value = '"…"' if default in (None, PydanticUndefined) else _toml(default)
        lines.append(f"# {key} = {value}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, width=110, initial_indent="# ", subsequent_indent="# ")


def _toml(value: Any) -> str:
    """A TOML literal for a default value: numbers, booleans, strings and lists of strings are as in JSON."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
