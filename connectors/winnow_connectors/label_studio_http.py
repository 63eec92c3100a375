"""Requests to a Label Studio server: the token, retries, and what its refusals mean.

Reading, changing and deleting is tried again while it fails in ways that may pass. What creates something is sent once:
when no answer comes, nobody knows whether it was done, which ``UnsureError`` says; who sent it looks before sending it
again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from winnow.errors import CallError, ReviewError
from winnow.uris import redact
from winnow_connectors.objects import Patience
from winnow_connectors.web import HttpClient, HttpFault

_JSON = {"Accept": "application/json", "Content-Type": "application/json"}
_PERSONAL = "personal"
_FORMS = ("Token", "Bearer", _PERSONAL)
"""Kinds of token: legacy, short-lived, and personal, which buys short-lived ones."""

_WHO = "/api/current-user/whoami"
_MAX_ANSWER = 1 << 30
_WRITE_SILENCE_S = 600.0
"""Longest wait for the answer to an import, which comes when all of it is in the database."""


class UnsureError(ReviewError):
    """No answer to a request that creates something: it was carried out, or not, or still is."""


class Connection:
    """A server and the token that opens it. The token stands in no message and no ``repr``."""

    def __init__(self, url: str, token: str, patience: Patience) -> None:
        self.url = url.rstrip("/")
        self.shown = redact(self.url)
        self._token = token
        self._authorization: str | None = None
        self._is_short_lived = False
        self._client = HttpClient(patience, num_connections=2, redirect=False)  # a redirect would carry the token away

    def __repr__(self) -> str:
        return f"Connection({self.shown!r}, token='***')"

    def get(self, path: str, **query: Any) -> Any:
        """The JSON at ``path``. Raises CallError or ReviewError."""
        url = self.url + path + (f"?{urlencode(query)}" if query else "")
        return self._retrying("GET", url)

    def delete(self, path: str) -> None:
        """Delete what ``path`` names; does nothing when it is gone. Raises CallError or ReviewError."""
        with contextlib.suppress(NotThereError):
            self._retrying("DELETE", self.url + path)

    def patch(self, path: str, value: Mapping[str, Any]) -> Any:
        """Change what ``path`` names; the JSON it is then. Raises CallError or ReviewError."""
        return self._retrying("PATCH", self.url + path, json.dumps(value).encode())

    def post(self, path: str, body: Mapping[str, Any] | bytes, **query: Any) -> Any:
        """Send once what creates something; the JSON answered.

        Args:
            path: of the call.
            body: JSON, or its bytes.
            query: parameters of the URL.

        Raises:
            UnsureError: no answer, or one that does not tell whether it was done.
            CallError: refused, because of the token or a right.
            ReviewError: refused for another reason.
        """
        url = self.url + path + (f"?{urlencode(query)}" if query else "")
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._authorize()
        try:
            return self._once_or_refreshed("POST", url, data, _WRITE_SILENCE_S)
        except HttpFault as fault:
            if fault.passing and fault.status != 429:
                raise UnsureError(
                    f"Label Studio at {self.shown} gave no answer to POST {path}: {fault.detail}"
                ) from None
            raise self._refused(fault, f"POST {path}") from None

    def ask_without_token(self, path: str) -> Any:
        """The JSON at ``path``, which needs no token. Raises HttpFault."""
        return self._client.retrying(lambda: self._send("GET", self.url + path, None, {}, None))

    def authorize(self) -> Mapping[str, Any]:
        """Who the token belongs to, as Label Studio tells it.

        Raises:
            CallError: no form of it is accepted.
            ReviewError: the server does not answer.
        """
        if not self._token:
            raise CallError("LABEL_STUDIO_API_KEY is not set; copy a token from Label Studio's Account & Settings page")
        try:
            return self._client.retrying(self._find_authorization)
        except HttpFault as fault:
            raise self._refused(fault, "the token") from None

    # -- inside --------------------------------------------------------------------------------------------------

    def _retrying(self, method: str, url: str, body: bytes | None = None) -> Any:
        self._authorize()
        try:
            return self._client.retrying(lambda: self._once_or_refreshed(method, url, body, None))
        except HttpFault as fault:
            raise self._refused(fault, f"{method} {url[len(self.url) :].partition('?')[0]}") from None

    def _authorize(self) -> None:
        if self._authorization is None:
            self.authorize()

    def _find_authorization(self) -> Mapping[str, Any]:
        """Try the forms of token that there are. Raises HttpFault."""
        faults: list[HttpFault] = []
        for form in _FORMS if self._token.count(".") != 2 else reversed(_FORMS):
            try:
                authorization = self._buy() if form == _PERSONAL else f"{form} {self._token}"
                user = self._send("GET", self.url + _WHO, None, {"Authorization": authorization}, None)
            except HttpFault as fault:
                if fault.status not in (400, 401):
                    raise
                faults.append(fault)
                continue
            if not isinstance(user, Mapping):
                raise _not_label_studio()
            self._authorization, self._is_short_lived = authorization, form == _PERSONAL
            return user
        raise faults[0]

    def _buy(self) -> str:
        """What a personal access token is good for: a token that opens for some minutes."""
        body = json.dumps({"refresh": self._token}).encode()
        answer = self._send("POST", f"{self.url}/api/token/refresh", body, {}, None)
        if not isinstance(answer, Mapping) or "access" not in answer:
            raise _not_label_studio()
        return f"Bearer {answer['access']}"

    def _once_or_refreshed(self, method: str, url: str, body: bytes | None, silence_s: float | None) -> Any:
        """One attempt; a second where a short-lived token has run out meanwhile: a 401 was not carried out."""
        try:
            return self._send(method, url, body, {"Authorization": self._authorization or ""}, silence_s)
        except HttpFault as fault:
            if fault.status != 401 or not self._is_short_lived:
                raise
            self._authorization = self._buy()
            return self._send(method, url, body, {"Authorization": self._authorization}, silence_s)

    def _send(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], silence_s: float | None
    ) -> Any:
        with self._client.open(method, url, {**_JSON, **headers}, body=body, silence_s=silence_s) as response:
            text = response.read(_MAX_ANSWER)
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise _not_label_studio() from None

    def _refused(self, fault: HttpFault, what: str) -> CallError | ReviewError:
        """A failure as an error that says what to do."""
        said = _said(fault)
        where = f"Label Studio at {self.shown}"
        if fault.status == 401:
            return CallError(
                f"{where} refuses the token in LABEL_STUDIO_API_KEY ({said}); copy one from its Account & Settings page"
            )
        if fault.status == 403:
            return CallError(
                f"{where} forbids {what} ({said}); use the token of a user who may create projects and tasks"
            )
        if fault.status == 404:
            return NotThereError(f"{where} knows no {what} ({said}); was it deleted?")
        if fault.status is None or fault.passing:
            return ReviewError(
                f"{where} does not answer ({said}); start it, or mend LABEL_STUDIO_URL, and run this again"
            )
        return ReviewError(f"{where} refuses {what}: {said}")


class NotThereError(ReviewError):
    """Label Studio knows no such thing (any more)."""


def _not_label_studio() -> HttpFault:
    return HttpFault("unavailable", "it answers, but not as Label Studio does", passing=False)


def _said(fault: HttpFault) -> str:
    """The status, and what the server wrote about it."""
    try:
        answer = json.loads(fault.body)
    except ValueError:
        return fault.detail
    if not isinstance(answer, Mapping):
        return fault.detail
    reasons = answer.get("validation_errors") or answer.get("detail") or answer
    text = reasons if isinstance(reasons, str) else json.dumps(reasons, ensure_ascii=False)
    return f"{fault.detail}: {redact(text)[:500]}"
