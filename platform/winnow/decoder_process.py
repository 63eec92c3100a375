"""A decoder process: reads files from a socket, answers with pixels. Started by ``winnow.decoders``.

It imports Pillow and numpy only, is given no credentials, and may use only so much memory.

Wire format, integers big-endian. Parent to child: once a JSON line of settings; then per image 8 bytes length and the
file. Child to parent: once ``R`` (ready); per image ``B`` (has the whole file, begins), 4 bytes length, a JSON object,
and the pixels of all views one after another. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from winnow.image_formats import load_plugins
from winnow.images import Attempt, DecodeLimits, View, attempt

_MAX_STDERR_BYTES = 2**20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: Sequence[str]) -> None:
    """The child: decode until the socket is closed.

    Args:
        arguments: the number of the inherited socket, and the parent's process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _die_with(int(arguments[1]))
    with socket.socket(fileno=int(arguments[0])) as connection, connection.makefile("rb") as requests:
        settings = json.loads(requests.readline())
        limits = DecodeLimits(**settings["limits"])
        views = [View.from_dict(view) for view in settings["views"]]
        load_plugins()
        _confine(limits)
        connection.sendall(b"R")
        while len(size := requests.read(8)) == 8:
            num_bytes = int.from_bytes(size, "big")
            data = requests.read(num_bytes)
            if len(data) < num_bytes:
                return
            connection.sendall(b"B")
            # A belt: the parent kills us earlier than this, unless it is gone.
            signal.setitimer(signal.ITIMER_REAL, limits.timeout_s + 10.0)
            started = time.process_time()
            sha256 = hashlib.sha256(data).hexdigest()
            outcome = attempt(
                data, limits=limits, views=views, scaled=settings["scaled"], fingerprints=settings["fingerprints"]
            )
            _reply(connection, sha256, time.process_time() - started, outcome)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            del data, outcome


def _reply(connection: socket.socket, sha256: str, decode_s: float, outcome: Attempt) -> None:
    image, error = outcome.image, outcome.error
    reply = {
        "sha256": sha256,
        "decode_s": decode_s,
        "header": asdict(outcome.header) if outcome.header else None,
        "error": [error.kind, error.message] if error else None,
        "image": image
        and {
            "width": image.width,
            "height": image.height,
            "format": image.format,
            "pixel_hash": image.pixel_hash,
            "phash": image.phash,
            "warnings": [warning[:300] for warning in image.warnings[:20]],
            "views": [view.shape[:2] for view in image.views],
        },
    }
    text = json.dumps(reply).encode()
    connection.sendall(b"".join((len(text).to_bytes(4, "big"), text)))
    for view in image.views if image else ():
        connection.sendall(view.reshape(-1).data)


def _die_with(parent: int) -> None:
    """End when the parent dies, also while an image is decoded. Elsewhere than on Linux: at the end of the image."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(0)


def _confine(limits: DecodeLimits) -> None:
    """Bound memory and files; be the first to go when the machine runs out of memory; no threads of our own."""
    for what, bound in (
        (resource.RLIMIT_AS, limits.max_memory_bytes),
        (resource.RLIMIT_FSIZE, _MAX_STDERR_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        with contextlib.suppress(ValueError, OSError):  # macOS has no RLIMIT_AS
            resource.setrlimit(what, (bound, bound) if hard == resource.RLIM_INFINITY else (min(bound, hard), hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    avif = sys.modules.get("PIL.AvifImagePlugin")
    if avif is not None:
        avif.DEFAULT_MAX_THREADS = 1  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(sys.argv[1:])
