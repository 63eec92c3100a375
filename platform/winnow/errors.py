"""Every error that Winnow raises on purpose.

::

    WinnowError
    ├── CallError             the call cannot be carried out as it stands: mend the call (exit code 2)
    │   ├── ConfigError       one or many faults in winnow.toml
    │   ├── QueryError        the SQL is wrong
    │   └── MaskError         a mask, or a label of pixels, is malformed or does not fit
    ├── JobError              the job started and could not finish (exit code 1)
    │   ├── OpenRunError      another run holds the same work
    │   ├── ReviewError       Label Studio refused, or cannot be reached
    │   ├── StoppedError      too many images failed for reasons of access or storage
    │   └── StorageError      the warehouse or a bucket cannot be used
    └── ImageError            one image could not be answered: becomes a row in ``outcomes``
        ├── FetchError        its bytes could not be read
        ├── DecodeError       its bytes are not an image that we can decode
        ├── InferenceError    the model could not answer it
        └── AugmentError      no augmented copy or view could be made of it

Errors cross process borders (Ray pickles them), so every class takes exactly the positional arguments that it
keeps in ``args``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["fetch", "decode", "infer", "augment"]


class WinnowError(Exception):
    """Base of all. ``message`` says what, which value, what is valid and what to do."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class CallError(WinnowError):
    """The call is wrong: unknown task, bad option, missing file. Nothing was started."""

    exit_code = 2


class ConfigError(CallError):
    """All faults of a configuration in one message."""


class QueryError(CallError):
    """The SQL engine refused the statement."""


class MaskError(CallError):
    """A mask, its encoding or a label of pixels is malformed, or does not fit its image or classes."""


class JobError(WinnowError):
    """The job started and could not finish. Running the same command again continues it."""


class OpenRunError(JobError):
    """Another, different run is open on the same work."""


class ReviewError(JobError):
    """The server on which people review refused a request, or cannot be reached."""


class StoppedError(JobError):
    """The run was stopped unpublished because access or storage failed for too many images."""


class StorageError(JobError):
    """A bucket, folder or the warehouse cannot be read or written."""


class ImageError(WinnowError):
    """One image failed. ``kind`` is the stable word that stands in ``outcomes.error``.

    Args:
        kind: a short identifier, such as ``forbidden`` or ``truncated``; see ``FAILURE_KINDS``.
        message: a sentence that a person can act on.
    """

    stage: Stage = "infer"

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.args = (kind, message)

    @property
    def retryable(self) -> bool:
        """True when the same image may succeed another time (storage faults, timeouts)."""
        return FAILURE_KINDS[self.kind].retryable


class FetchError(ImageError):
    """The bytes could not be read from storage."""

    stage: Stage = "fetch"


class DecodeError(ImageError):
    """The bytes could not be turned into pixels."""

    stage: Stage = "decode"


class InferenceError(ImageError):
    """The model could not answer."""

    stage: Stage = "infer"


class AugmentError(ImageError):
    """No augmented copy or view could be made."""

    stage: Stage = "augment"


@dataclass(frozen=True)
class FailureKind:
    """What a value of ``outcomes.error`` means.

    Attributes:
        meaning: one phrase for documentation and reports.
        retryable: ``predict --retry-failures`` asks such images again.
        systemic: counts towards ``max_failure_share``: a sign of broken access or storage, not of a bad image.
    """

    meaning: str
    retryable: bool = False
    systemic: bool = False


FAILURE_KINDS: dict[str, FailureKind] = {
    # fetch
    "forbidden": FailureKind("storage refused access (401 or 403)", retryable=True, systemic=True),
    "missing": FailureKind("the object is gone (404)", retryable=True, systemic=True),
    "changed": FailureKind("the object changed since it was ingested; ingest again"),
    "unavailable": FailureKind(
        "storage kept failing (5xx, refused connection) after retries", retryable=True, systemic=True
    ),
    "stalled": FailureKind("the body stopped arriving within the time limit", retryable=True, systemic=True),
    "incomplete": FailureKind("fewer bytes arrived than storage announced", retryable=True, systemic=True),
    "too_many_bytes": FailureKind("the object is larger than max_bytes"),
    "empty": FailureKind("the object has no bytes"),
    # decode
    "not_an_image": FailureKind("the bytes are of no image format that is known"),
    "unsupported": FailureKind("an image format or variant that is recognised but not decoded"),
    "too_many_pixels": FailureKind("the header announces more pixels than max_pixels"),
    "truncated": FailureKind("the image ends before its last pixel"),
    "corrupt": FailureKind("the image data is damaged"),
    "timeout": FailureKind("decoding took longer than image_timeout_s", retryable=True),
    "out_of_memory": FailureKind("decoding needed more memory than allowed", retryable=True),
    "crashed": FailureKind("the decoder process died on this image", retryable=True),
    # infer
    "not_finite": FailureKind("the model answered NaN or infinity"),
    # augment
    "not_augmented": FailureKind("a transform cannot be applied to this image, such as a crop larger than it"),
    "bad_mask": FailureKind("the mask of the image's label does not fit the image, or is no mask"),
}
"""Every value of ``outcomes.error``, with its meaning."""
