"""Who may ask, and what a browser may do with the answers."""

from __future__ import annotations

import json
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # a URL may hold the token
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
COOKIE = "geomatch-token"


class AccessControl:
    """Lets requests through to `app` that may ask.

    Without a token, only those that name this machine: another name for it is how a page from
    elsewhere would read what is here (DNS rebinding). With one, only those that know it: by the
    header `Authorization: Bearer`, or by the cookie that `/?token=` sets.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        answer = self._stopped(scope)
        await (answer or self._app)(scope, receive, send_with_headers)

    def _stopped(self, scope: Scope) -> Response | None:
        """The answer to a request that does not come through."""
        headers = Headers(scope=scope)
        if self._token is None:
            if _name(headers.get("host", "")) not in LOOPBACK:
                return refused(403, "this server answers to localhost alone")
        elif scope["path"] == "/" and (given := _token_of_url(scope)) is not None:
            if not self._is_right(given):
                return refused(
                    401, "the token is wrong", "Use the URL that geomatch serve printed."
                )
            response = RedirectResponse("/", 303)
            response.set_cookie(COOKIE, given, httponly=True, samesite="lax")
            return response
        elif not any(map(self._is_right, _tokens(headers))):
            hint = "Open the URL that geomatch serve printed, or send: Authorization: Bearer TOKEN"
            return refused(401, "a token is needed", hint)
        if _is_foreign(headers):
            return refused(403, "this request comes from a page of another server")
        return None

    def _is_right(self, given: str) -> bool:
        assert self._token is not None
        return secrets.compare_digest(given.encode(), self._token.encode())


def refused(status: int, error: str, hint: str = "") -> Response:
    """An answer that says what is wrong, and what to do."""
    text = json.dumps({"error": error, "hint": hint})
    return Response(text, status, media_type="application/json")


def _name(host: str) -> str:
    """The name in a header Host, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _token_of_url(scope: Scope) -> str | None:
    found = parse_qs(scope["query_string"].decode("latin-1")).get("token")
    return found[0] if found else None


def _tokens(headers: Headers) -> list[str]:
    """The tokens that a request has."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    found = [token.strip()] if kind.lower() == "bearer" else []
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return found
    return [*found, cookie.value] if cookie else found


def _is_foreign(headers: Headers) -> bool:
    """Whether a page of another server asks, by what browsers say of it."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return True
    from_elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
    return from_elsewhere and headers.get("sec-fetch-mode") != "navigate"
