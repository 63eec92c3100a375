"""State dicts from files that nobody vouches for: read without running code, and compared with a network.

``.safetensors`` holds tensors only. ``.pth``, ``.pt`` and ``.pth.tar`` are pickles and are read with
``torch.load(weights_only=True)``, which builds tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import signal
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from winnow.errors import CallError

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pth.tar", ".pth", ".pt")
"""File names that are taken for checkpoints."""

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the state dict, beside the optimiser's and the epoch."""

_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""

_UNPICKLING_FAULTS = (
    *(pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError),
    *(ImportError, OverflowError, MemoryError, struct.error),
)
"""What ``torch.load(weights_only=True)`` raises on refused and on damaged files."""


def sha256_of(source: Path | bytes) -> str:
    """Hex SHA-256 of a file or of bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(source: Path | bytes, name: str) -> dict[str, Tensor]:
    """Tensors by key, on the CPU, without the prefixes of DistributedDataParallel and torch.compile.

    Args:
        source: the file, or its bytes.
        name: the file's name: its ending says what it is, and messages name it.

    Raises:
        CallError: the file holds more than tensors, is damaged, or holds no state dict.
    """
    loaded = _read_safetensors(source, name) if name.endswith(".safetensors") else _read_pickle(source, name)
    return _strip_prefixes(_find_state_dict(loaded, name))


def check_state_dict(network: nn.Module, state: Mapping[str, Tensor], name: str, num_classes: int) -> None:
    """Compare keys and shapes. ``num_batches_tracked`` may be missing: it only counts training steps.

    Raises:
        CallError: the file does not fit the network; the message names the first keys.
    """
    expected = network.state_dict()
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if not (missing or unexpected or wrong):
        return
    if wrong and not (missing or unexpected):
        outputs = _num_outputs(expected, state, wrong, num_classes)
        if outputs is not None:
            raise CallError(
                f"{name} has {outputs} outputs, but {num_classes} classes are given; name all of its classes"
            )
    faults = []
    if missing:
        faults.append(f"{len(missing)} keys are missing: {_first(missing)}")
    if unexpected:
        faults.append(f"{len(unexpected)} keys are unexpected: {_first(unexpected)}")
    if wrong:
        shapes = [f"{key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}" for key in wrong[:3]]
        faults.append(f"{len(wrong)} shapes are wrong: {'; '.join(shapes)}")
    raise CallError(f"{name} does not fit the architecture: {'. '.join(faults)}. Check architecture and classes")


def is_two_parts(state: Mapping[str, Any]) -> bool:
    """True for the weights of a trained version: every key begins with ``backbone.`` or ``head.``, and both occur."""
    return {key.partition(".")[0] for key in state} == {"backbone", "head"}


def linear_head_in(state: Mapping[str, Any]) -> Literal["linear", "rms_linear"]:
    """Which linear head a trained version's weights hold, told by its keys."""
    return "rms_linear" if "head.linear.weight" in state else "linear"


def _read_safetensors(source: Path | bytes, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        with interrupts_wait():
            return load(source) if isinstance(source, bytes) else load_file(source)
    except (SafetensorError, ValueError) as error:
        raise CallError(f"{name} cannot be read as safetensors: {error}; is it complete?") from None
    except OSError as error:
        raise CallError(f"{name} cannot be read: {error.strerror or error}") from None


def _read_pickle(source: Path | bytes, name: str) -> object:
    import torch

    stream: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with interrupts_wait(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript archives, which are refused anyway
            return torch.load(stream, map_location="cpu", weights_only=True)
    except _UNPICKLING_FAULTS as error:
        said = str(error)
        if isinstance(error, pickle.UnpicklingError):
            # torch's message: a paragraph of advice, then the reason, then more advice.
            reason = _first_line(said.partition("\n\n")[2] or said)
            raise CallError(
                f"{name} is refused: it holds more than tensors, or none at all ({reason}), and loading that could run "
                "code; save model.state_dict() alone, best as .safetensors"
            ) from None
        if "TorchScript" in said:
            raise CallError(f"{name} is a TorchScript archive; save model.state_dict() instead") from None
        if isinstance(error, OSError) and error.strerror:
            raise CallError(f"{name} cannot be read: {error.strerror}") from None
        raise CallError(
            f"{name} is refused: it is damaged, cut off, or not a file of tensors "
            f"({_first_line(said) or type(error).__name__}); copy it again, or save model.state_dict() as .safetensors"
        ) from None


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block, which should be short.

    For native code that turns a KeyboardInterrupt in the middle of it into an error of its own, such as safetensors'
    "could not determine the shape". In other threads than the main one, which never get it, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _find_state_dict(loaded: object, name: str) -> dict[str, Tensor]:
    import torch

    candidates = [loaded]
    if isinstance(loaded, Mapping):
        candidates += [loaded[key] for key in _WRAPPERS if key in loaded]
    for candidate in candidates:
        if not isinstance(candidate, Mapping) or not candidate:
            continue
        if all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in candidate.items()):
            return dict(candidate)
    what = f"a {type(loaded).__name__}"
    if isinstance(loaded, Mapping):
        what = f"a mapping with the keys {_first([str(key) for key in loaded])}" if loaded else "an empty mapping"
    raise CallError(f"{name} holds no state dict but {what}; save model.state_dict()")


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in (*_PREFIXES, *_PREFIXES):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _num_outputs(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], wrong: list[str], num_classes: int
) -> int | None:
    """Outputs of the file's network, when that is all in which it differs."""
    found = set()
    for key in wrong:
        ours, theirs = expected[key].shape, state[key].shape
        if not ours or not theirs or ours[0] != num_classes or ours[1:] != theirs[1:]:
            return None
        found.add(int(theirs[0]))
    return found.pop() if len(found) == 1 else None


def _first(keys: list[str], n: int = 5) -> str:
    return ", ".join(keys[:n]) + (", …" if len(keys) > n else "")


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200].rstrip(". ") if text.strip() else ""
