"""Check of the Label Studio server that LABEL_STUDIO_URL names."""

from __future__ import annotations

import os

from winnow.errors import CallError, ReviewError
from winnow_connectors.label_studio import LabelStudio
from winnow_connectors.objects import Patience
from winnow_jobs.checks import Check, fail, ok, warn

_NAME = "label studio"
_PATIENCE = Patience(silence_s=3.0, retry_s=0.0)


def check_label_studio() -> Check:
    """Whether it answers, is new enough, and whether the token of LABEL_STUDIO_API_KEY may do all that is needed."""
    url, token = (os.environ.get(name, "").strip() for name in ("LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY"))
    if not url:
        return ok(_NAME, "not configured (LABEL_STUDIO_URL is not set)")
    try:
        server = LabelStudio(url, token, patience=_PATIENCE)
        if not token:
            found = f"{server.release()} at {server.url}; LABEL_STUDIO_API_KEY is not set"
            return warn(_NAME, found, "copy a token from its Account & Settings page")
        opened = server.check()
        return ok(_NAME, f"{opened.release} at {server.url}; the token opens it as {opened.user}")
    except (CallError, ReviewError) as error:
        detail, _, mend = error.message.rpartition("; ")  # every such message ends on what to do
        return fail(_NAME, detail, mend)
