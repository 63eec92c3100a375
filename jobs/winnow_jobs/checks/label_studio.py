"""Check of the Label Studio server that LABEL_STUDIO_URL names."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from email.message import Message
from typing import IO, Any

from winnow.uris import redact
from winnow_jobs.checks import Check, fail, ok, warn

_NAME = "label studio"
_TIMEOUT_S = 3.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to wherever it points."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def check_label_studio() -> Check:
    """Whether it answers, and whether the token of LABEL_STUDIO_API_KEY opens it."""
    url = os.environ.get("LABEL_STUDIO_URL", "").rstrip("/")
    if not url:
        return ok(_NAME, "not configured (LABEL_STUDIO_URL is not set)")
    shown = redact(url)
    if not url.startswith(("http://", "https://")):
        return fail(_NAME, f"LABEL_STUDIO_URL={shown!r} is no web address", "set it to http://HOST:PORT")
    try:
        code, answer = _ask(f"{url}/api/version")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return fail(_NAME, f"{shown} does not answer ({reason})", "start Label Studio, or mend LABEL_STUDIO_URL")
    if code != 200 or not isinstance(answer, dict) or "release" not in answer:
        return fail(
            _NAME,
            f"{shown} answers ({code}), but not as Label Studio does",
            "mend LABEL_STUDIO_URL: scheme, host and port",
        )
    server = f"{answer['release']} at {shown}"
    token = os.environ.get("LABEL_STUDIO_API_KEY", "").strip()
    if not token:
        return warn(
            _NAME, f"{server}; LABEL_STUDIO_API_KEY is not set", "copy a token from its Account & Settings page"
        )
    if not token.isascii() or not token.isprintable() or " " in token:  # an error about such a header would quote it
        return fail(
            _NAME, f"{server}; LABEL_STUDIO_API_KEY is no token: it has blanks or control characters", "copy it again"
        )
    try:
        return _check_token(url, server, token)
    except OSError as error:
        return fail(_NAME, f"{server} stopped answering ({getattr(error, 'reason', None) or error})", "try again")


def _check_token(url: str, server: str, token: str) -> Check:
    code = 0
    for form in ("Token", "Bearer"):
        code, user = _ask(f"{url}/api/current-user/whoami", authorization=f"{form} {token}")
        if code == 200:
            return ok(_NAME, f"{server}; the token opens it as {_user(user)}")
    # A personal access token only buys a short-lived one.
    refresh_code, answer = _ask(f"{url}/api/token/refresh", body={"refresh": token})
    if refresh_code == 200 and isinstance(answer, dict) and "access" in answer:
        code, user = _ask(f"{url}/api/current-user/whoami", authorization=f"Bearer {answer['access']}")
        if code == 200:
            return ok(_NAME, f"{server}; the personal access token opens it as {_user(user)}")
    return fail(
        _NAME,
        f"{server} refuses the token in LABEL_STUDIO_API_KEY ({code})",
        "copy a token from its Account & Settings page; legacy tokens must be allowed in Organization settings",
    )


def _user(answer: Any) -> str:
    return str(answer.get("email") or answer.get("username") or "a user") if isinstance(answer, dict) else "a user"


def _ask(url: str, *, authorization: str | None = None, body: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status code and decoded JSON (None when it is none)."""
    headers = {"Accept": "application/json"} | ({"Authorization": authorization} if authorization else {})
    data = None
    if body is not None:
        headers["Content-Type"], data = "application/json", json.dumps(body).encode()
    request = urllib.request.Request(url, headers=headers, data=data)
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_S) as response:
            code, text = response.status, response.read(1_000_000)
    except urllib.error.HTTPError as error:
        with error:
            code, text = error.code, error.read(1_000_000)
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP: {type(error).__name__}") from None
    try:
        return code, json.loads(text)
    except ValueError:
        return code, None
