"""Decoder processes: no image can crash, hang or starve the process that asks.

Every decoder is a child process, ``winnow.decoder_process``. One thread per child hands it one image at a time over a
socket, in the wire format described there, and enforces the deadline.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import numpy as np

from winnow.errors import FAILURE_KINDS, DecodeError, JobError
from winnow.images import DecodedImage, DecodeLimits, Header, Pixels, View, attempt

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_START_ATTEMPTS = 3
_MAX_REPLY_BYTES = 2**20
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHOME", "TMPDIR", "TZ")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Decoded:
    """What became of one image: ``image`` or ``error``, never both.

    Attributes:
        sha256: of the bytes, in hex; also of failed images.
        decode_s: CPU seconds of the child, hashing included; 0 when the child died.
        image: the pixels, or None.
        error: why there are none, or None.
        header: width, height and format as far as the header could be read, also of failed images.
    """

    sha256: str
    decode_s: float
    image: DecodedImage | None
    error: DecodeError | None
    header: Header | None = None


class DecoderPool:
    """Decodes in ``num_processes`` child processes; safe to use from many threads.

    A child that dies or exceeds ``limits.timeout_s`` costs exactly the image it was working on. Submitted images wait
    in memory without a bound: submit no more than can be held. Children end with the pool, and when the parent dies.

    Raises (from the futures):
        JobError: decoder processes do not start on this machine.
    """

    def __init__(
        self,
        num_processes: int,
        *,
        limits: DecodeLimits,
        views: Sequence[View] = (),
        scaled: bool = False,
        fingerprints: bool = False,
    ) -> None:
        if num_processes < 1:
            raise ValueError(f"num_processes is {num_processes}; it must be at least 1")
        self._limits = limits
        self._queue: queue.SimpleQueue[tuple[bytes, Future[Decoded]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._children = [_Child(limits, tuple(views), scaled, fingerprints) for _ in range(num_processes)]
        self._threads = [
            threading.Thread(target=self._work, args=(child,), name=f"decoder-{number}", daemon=True)
            for number, child in enumerate(self._children)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the children that run now."""
        return tuple(child.pid for child in self._children if child.pid is not None)

    def submit(self, data: bytes) -> Future[Decoded]:
        """Decode ``data``; the future's result holds the image or the ``DecodeError``.

        Raises:
            JobError: the pool is closed.
        """
        future: Future[Decoded] = Future()
        with self._lock:
            if self._closed:
                raise JobError("the decoder pool is closed; open another one")
            self._queue.put((data, future))
        return future

    def close(self) -> None:
        """Cancel what has not begun, finish what has, end the children. May be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                with contextlib.suppress(queue.Empty):
                    while (item := self._queue.get_nowait()) is not None:
                        item[1].cancel()
                for _ in self._threads:
                    self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, child: _Child) -> None:
        with contextlib.suppress(JobError):  # told to the first image, if it is still so then
            child.start()
        while (item := self._queue.get()) is not None:
            data, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._decode(child, data))
            except BaseException as error:  # noqa: BLE001  a dead thread would leave its callers waiting for ever
                future.set_exception(error)
            del item, data, future  # do not keep the pixels alive while waiting for the next image
        child.stop()

    def _decode(self, child: _Child, data: bytes) -> Decoded:
        if len(data) > self._limits.max_bytes:  # not worth sending
            tried = attempt(data, limits=self._limits)
            return Decoded(hashlib.sha256(data).hexdigest(), 0.0, tried.image, tried.error, tried.header)
        error = DecodeError("crashed", "decoder processes keep dying before they read this image; free memory")
        for _ in range(_START_ATTEMPTS):
            child.start()
            try:
                return child.decode(data)
            except _ChildDiedError as death:
                if death.began:
                    error = death.error
                    break
        return Decoded(hashlib.sha256(data).hexdigest(), 0.0, None, error)


class _ChildDiedError(Exception):
    """The child is gone; ``began`` when it had the whole image, so that the image is to blame."""

    def __init__(self, began: bool, error: DecodeError) -> None:
        super().__init__(began, error)
        self.began = began
        self.error = error


class _Child:
    """One child process, used by one thread. Started again after its death."""

    def __init__(self, limits: DecodeLimits, views: tuple[View, ...], scaled: bool, fingerprints: bool) -> None:
        self._limits = limits
        self._views = views
        settings = {
            "limits": asdict(limits),
            "views": [asdict(view) for view in views],
            "scaled": scaled,
            "fingerprints": fingerprints,
        }
        self._settings = json.dumps(settings).encode() + b"\n"
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._stderr: IO[bytes] | None = None
        self._timeout_s = 0.0

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Start the process unless it runs.

        Raises:
            JobError: it does not start.
        """
        if self._process is not None and self._process.poll() is None:
            return
        for left in reversed(range(_START_ATTEMPTS)):
            self.stop()
            try:
                self._spawn()
                return
            except OSError as error:  # also a timeout, and a child that died on its way
                said = self._last_words(0) or str(error) or type(error).__name__
                if left == 0:
                    self.stop()
                    raise JobError(
                        f"decoder processes do not start with {sys.executable}: {said}; "
                        "check the memory and processes this machine allows, and that Pillow and numpy import"
                    ) from error
                time.sleep(0.2)

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop()
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment |= _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            self._process = subprocess.Popen(
                # -P: the working directory is not searched for modules. No fork of a threaded parent runs Python code.
                [sys.executable, "-P", "-m", "winnow.decoder_process", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env=environment,
                pass_fds=(theirs.fileno(),),
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        self._timeout_s = 0.0
        self._set_timeout(deadline)
        ours.sendall(self._settings)
        self._receive(memoryview(bytearray(1)), deadline)

    def stop(self) -> None:
        """End the process, at once and whatever it does."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._stderr is not None:
            self._stderr.close()
        self._process = self._socket = self._stderr = None

    def decode(self, data: bytes) -> Decoded:
        """Decode in the running child.

        Raises:
            _ChildDiedError: it died or was killed for taking too long.
        """
        assert self._socket is not None
        assert self._stderr is not None
        said_before = os.fstat(self._stderr.fileno()).st_size
        deadline = time.monotonic() + self._limits.timeout_s
        began = False
        try:
            self._set_timeout(deadline)
            size = len(data).to_bytes(8, "big")
            sent = self._socket.sendmsg((size, data))
            if sent < len(size) + len(data):
                self._socket.sendall(size[sent:])
                self._socket.sendall(memoryview(data)[max(sent - len(size), 0) :])
            self._receive(memoryview(bytearray(1)), deadline)
            began = True
            decoded = self._receive_reply(deadline)
            said = self._last_words(said_before)  # the C libraries complain here about damage that they mended
            if said and decoded.image is not None:
                image = replace(decoded.image, warnings=(*decoded.image.warnings, said))
                decoded = replace(decoded, image=image)
            return decoded
        except TimeoutError:
            message = f"decoding took longer than {self._limits.timeout_s:g} s and was stopped"
            death = _ChildDiedError(True, DecodeError("timeout", message))
        except (OSError, ValueError, KeyError, TypeError) as error:  # closed, or not our wire format
            death = _ChildDiedError(began, self._post_mortem(error, said_before))
        logger.warning("decoder process %s: %s %s", self.pid, death.error, self._last_words(said_before))
        self.stop()
        raise death

    def _post_mortem(self, error: Exception, said_before: int) -> DecodeError:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            return DecodeError("crashed", f"the decoder process broke its protocol ({error}) and was stopped")
        if code == -signal.SIGKILL:
            return DecodeError("crashed", "the decoder process was killed (SIGKILL); the machine may lack memory")
        how = signal.strsignal(-code) if code < 0 else self._last_words(said_before) or f"exit code {code}"
        return DecodeError("crashed", f"the decoder process died on this image ({how}); replace the file")

    def _last_words(self, since: int) -> str:
        """The last line on the child's stderr."""
        if self._stderr is None:
            return ""
        end = os.fstat(self._stderr.fileno()).st_size
        start = max(since, end - 2000)
        lines = os.pread(self._stderr.fileno(), end - start, start).decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def _receive_reply(self, deadline: float) -> Decoded:
        size = bytearray(4)
        self._receive(memoryview(size), deadline)
        length = int.from_bytes(size, "big")
        if length > _MAX_REPLY_BYTES:
            raise ValueError(f"a reply of {length} bytes")
        text = bytearray(length)
        self._receive(memoryview(text), deadline)
        reply: dict[str, Any] = json.loads(text)
        header = Header(**reply["header"]) if reply["header"] else None
        sha256, decode_s = str(reply["sha256"]), float(reply["decode_s"])
        if reply["error"]:
            kind, message = reply["error"]
            if kind not in FAILURE_KINDS:
                raise ValueError(f"an unknown kind of failure {kind!r}")
            return Decoded(sha256, decode_s, None, DecodeError(kind, message), header)
        image = reply["image"]
        shapes = [(int(height), int(width), 3) for height, width in image.pop("views")]
        if len(shapes) != len(self._views) or any(math.prod(shape) > self._max_view_bytes for shape in shapes):
            raise ValueError(f"views of the shapes {shapes}")
        views: list[Pixels] = []
        for shape in shapes:
            view = np.empty(shape, dtype=np.uint8)
            self._receive(view.reshape(-1).data, deadline)
            views.append(view)
        warnings = tuple(image.pop("warnings"))
        return Decoded(sha256, decode_s, DecodedImage(**image, views=tuple(views), warnings=warnings), None, header)

    @property
    def _max_view_bytes(self) -> int:
        return 3 * max([self._limits.max_pixels, *(math.prod(view.size) for view in self._views if view.size)])

    def _receive(self, buffer: memoryview, deadline: float) -> None:
        assert self._socket is not None
        while buffer:
            self._set_timeout(deadline)
            received = self._socket.recv_into(buffer)
            if not received:
                raise ConnectionError("the decoder process closed its socket")
            buffer = buffer[received:]

    def _set_timeout(self, deadline: float) -> None:
        """Let the socket wait until about the deadline. Every change is a system call, so 50 ms late is good enough."""
        assert self._socket is not None
        left_s = max(deadline - time.monotonic(), 1e-3)
        if not 0.0 <= self._timeout_s - left_s < 0.05:
            self._timeout_s = left_s
            self._socket.settimeout(left_s)
