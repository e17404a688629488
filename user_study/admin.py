"""The admin page: how the study stands, pause and resume, export. Behind a password; on nobody else's page.

State-changing requests need a header of our own, which no form of another site can send.
"""

from __future__ import annotations

import secrets
from base64 import b64decode
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment
from limits import RateLimitItemPerMinute
from pydantic import BaseModel, ConfigDict

from user_study.export import encode_export, export_rows
from user_study.study import ServedStudy

USER = "admin"
WRONG_PASSWORDS = RateLimitItemPerMinute(10)
_NO_STORE = {"Cache-Control": "no-store"}
_TYPES = {"csv": "text/csv", "jsonl": "application/x-ndjson", "parquet": "application/vnd.apache.parquet"}


class PauseRequest(BaseModel):
    """Whether to hand out pairs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    paused: bool


def require_admin(request: Request, authorization: Annotated[str, Header()] = "") -> None:
    """Let only the administrator pass: 404 where there is none, 401 without the password, 429 after ten wrong ones."""
    password: str | None = request.app.state.admin_password
    if password is None:
        raise HTTPException(404, "no-admin-page")
    given = _basic(authorization)
    if given is not None and secrets.compare_digest(given, f"{USER}:{password}".encode()):
        return
    if authorization:
        address = request.client.host if request.client else "unknown"
        request.app.state.limits.check(WRONG_PASSWORDS, f"admin {address}")
    raise HTTPException(401, "password", {"WWW-Authenticate": 'Basic realm="study", charset="UTF-8"'})


def same_site(x_study_admin: Annotated[str, Header()] = "") -> None:
    """Refuse what another site's page could send."""
    if x_study_admin != "1":
        raise HTTPException(403, "cross-site")


routes = APIRouter(prefix="/admin", dependencies=[Depends(require_admin)])


@routes.get("/")
def page(request: Request) -> HTMLResponse:
    """The page; it fetches its figures."""
    study: ServedStudy = request.app.state.study
    nonce = secrets.token_urlsafe(16)
    html = _template().render(study=study.id, title=_title(study), nonce=nonce)
    policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # noqa: E501
    return HTMLResponse(html, headers={**_NO_STORE, "Content-Security-Policy": policy})


@routes.get("/state.json")
def state(request: Request, response: Response) -> dict[str, Any]:
    """How the study stands."""
    from user_study.progress import progress  # scipy with it: a second that the start of the server need not wait

    response.headers.update(_NO_STORE)
    study: ServedStudy = request.app.state.study
    votes = study.votes
    found = progress(
        study.design, votes.votes(), votes.assignments(), votes.raters(), votes.paused(), datetime.now(UTC)
    )
    return found.to_json()


@routes.post("/pause", dependencies=[Depends(same_site)])
def pause(body: PauseRequest, request: Request, response: Response) -> dict[str, bool]:
    """Stop handing out pairs, or go on."""
    response.headers.update(_NO_STORE)
    request.app.state.study.votes.set_paused(body.paused)
    return {"paused": body.paused}


@routes.get("/export")
def export(request: Request, form: Literal["csv", "jsonl", "parquet"] = "csv") -> Response:
    """The votes as ``study export`` writes them."""
    study: ServedStudy = request.app.state.study
    data = encode_export(export_rows(study.design, study.votes.votes(), study.key), form)
    name = f'attachment; filename="votes-{study.id}.{form}"'
    return Response(data, media_type=_TYPES[form], headers={**_NO_STORE, "Content-Disposition": name})


def _basic(authorization: str) -> bytes | None:
    kind, _, value = authorization.partition(" ")
    try:
        return b64decode(value, validate=True) if kind.lower() == "basic" else None
    except ValueError:
        return None


def _title(study: ServedStudy) -> str:
    wording = next(iter(study.design.wording.values()))
    return str(wording["title"])


@cache
def _template() -> Any:
    text = files("user_study").joinpath("page", "admin.html").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(text)
