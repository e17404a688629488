"""The study's HTTP service: join, next, vote, undo, images, health. It knows nothing of the page that calls it.

No answer holds a model's name, a file name or a path. Who a rater is, is in a signed HttpOnly cookie; a handler acts
only on that rater's own assignments. Errors are ``{"error": code}``; the page has the words.
"""

from __future__ import annotations

from html import escape
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from user_study.admin import routes as admin_routes
from user_study.design import Choice
from user_study.guard import BAD_LINKS_PER_ADDRESS, JOINS_PER_ADDRESS, WRITES_PER_RATER, Guard, RateLimits
from user_study.links import BadLink, ExpiredLink, make_cookie, read_cookie, read_link
from user_study.strings import catalogue
from user_study.study import ServedStudy
from user_study.votes import Ballot, NotConsented, Recorded, Turn, UnknownAssignment, UnknownRater
from user_study.votes.database import DatabaseDown

_COOKIE_SECONDS = 90 * 24 * 3600
_DAY_MS = 24 * 3600 * 1000
_NO_STORE = {"Cache-Control": "no-store"}
_IMAGE_HEADERS = {"Cache-Control": "private, max-age=31536000, immutable", "Content-Disposition": "inline"}
_KEY = r"^[A-Za-z0-9_-]{16,40}$"

routes = APIRouter()


class _Body(BaseModel):
    """A request; anything more, less or different is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class LanguageRequest(_Body):
    """Consent, or a change of language."""

    language: Annotated[str, Field(pattern=r"^[a-z]{2}$")]


class VoteRequest(_Body):
    """What a browser sends for a vote."""

    key: Annotated[str, Field(pattern=_KEY)]
    assignment_id: Annotated[str, Field(pattern=_KEY)]
    choices: Annotated[dict[str, Choice], Field(min_length=1, max_length=8)]
    response_ms: Annotated[int, Field(ge=0, le=_DAY_MS)]
    hidden_ms: Annotated[int, Field(ge=0, le=_DAY_MS)] = 0
    input: Literal["key", "pointer", "touch"]
    viewport: Annotated[str, Field(pattern=r"^\d{1,5}x\d{1,5}$")]
    pixel_ratio: Annotated[float, Field(gt=0, le=100)]
    language: Annotated[str, Field(pattern=r"^[a-z]{2}$")]


class UndoRequest(_Body):
    """What a browser sends to take a vote back: the vote's key."""

    key: Annotated[str, Field(pattern=_KEY)]


def create_service(study: ServedStudy, admin_password: str | None = None) -> FastAPI:
    """Build the service of an opened study; ``/study`` is left to the page, no password leaves out the admin page."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.study = study
    app.state.limits = RateLimits()
    app.state.admin_password = admin_password
    app.add_middleware(Guard)
    app.include_router(routes)
    app.include_router(admin_routes)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _wrong_request)
    for error, status, code in (
        (UnknownAssignment, 404, "unknown-assignment"),
        (UnknownRater, 401, "join-first"),
        (NotConsented, 409, "not-consented"),
        (DatabaseDown, 503, "database"),
    ):
        app.add_exception_handler(error, _answering(status, code))
    return app


async def served_study(request: Request) -> ServedStudy:
    """The study that this application serves."""
    study: ServedStudy = request.app.state.study
    return study


async def rate_limits(request: Request) -> RateLimits:
    """The limits of this process."""
    limits: RateLimits = request.app.state.limits
    return limits


Served = Annotated[ServedStudy, Depends(served_study)]
Limits = Annotated[RateLimits, Depends(rate_limits)]


async def known_rater(request: Request, study: Served) -> str | None:
    """The rater whose signed cookie came with the request, if any."""
    value = request.cookies.get(_cookie_name(study))
    return read_cookie(study.key, value) if value else None


Known = Annotated[str | None, Depends(known_rater)]


async def joined_rater(known: Known) -> str:
    """The rater's id; 401 for anybody who has not joined."""
    if known is None:
        raise HTTPException(401, "join-first")
    return known


Rater = Annotated[str, Depends(joined_rater)]


async def writing_rater(rater: Rater, limits: Limits) -> str:
    """The rater's id, if the rater does not write too often."""
    limits.check(WRITES_PER_RATER, f"rater {rater}")
    return rater


WritingRater = Annotated[str, Depends(writing_rater)]


@routes.get("/")
async def start() -> RedirectResponse:
    """Send people to the page; relative, because a proxy may serve us under a path of its own."""
    return RedirectResponse("study/")


@routes.get("/favicon.ico", status_code=204)
async def no_icon() -> None:
    """There is no icon."""


@routes.get("/livez")
async def live() -> PlainTextResponse:
    """Say that the process answers."""
    return PlainTextResponse("ok")


@routes.get("/readyz")
def ready(study: Served) -> PlainTextResponse:
    """Say whether votes can be taken."""
    try:
        study.votes.ping()
    except DatabaseDown:
        return PlainTextResponse("the database does not answer", 503)
    return PlainTextResponse("ok")


@routes.get("/img/{name}")
def image(name: str, study: Served) -> Response:
    """An image of the study, by its opaque id."""
    file = study.images.get(name)
    if file is None:
        raise HTTPException(404, "no-such-image")
    # read and sent by hand: a file response would tell when each file was written, which tells the order
    return Response(file.read_bytes(), media_type="image/png", headers=_IMAGE_HEADERS)


@routes.get("/api/welcome")
def welcome(response: Response, study: Served, known: Known) -> dict[str, Any]:
    """All words of the page, and whether the caller is a rater already."""
    response.headers.update(_NO_STORE)
    language = study.votes.language(known) if known else None
    return {
        "study": study.id,
        "paused": study.votes.paused(),
        "invited_only": study.invited_only,
        "languages": list(study.design.wording),
        "strings": {name: catalogue()[name]["page"] for name in study.design.wording},
        "wording": study.design.wording,
        "criteria": list(study.design.criteria),
        "known": language is not None,
        "language": language or None,
    }


@routes.post("/api/join")
def join(request: Request, response: Response, study: Served, known: Known, limits: Limits) -> dict[str, Any]:
    """Make the caller a rater, unless the caller is one."""
    response.headers.update(_NO_STORE)
    if known is None or study.votes.language(known) is None:
        if study.invited_only:
            raise HTTPException(403, "invitation-needed")
        limits.check(JOINS_PER_ADDRESS, f"join {_address(request)}")
        _set_cookie(request, response, study, study.votes.join())
    return {}


@routes.get("/r/{token}")
def invited(token: str, request: Request, study: Served, limits: Limits) -> Response:
    """Let an invited rater in by a signed link."""
    try:
        rater = read_link(study.key, token)
    except (BadLink, ExpiredLink) as error:
        limits.check(BAD_LINKS_PER_ADDRESS, f"link {_address(request)}")
        return _link_page("expired_link" if isinstance(error, ExpiredLink) else "bad_link", study)
    response = RedirectResponse("../study/", 303, headers=_NO_STORE)
    _set_cookie(request, response, study, study.votes.join(rater))
    return response


@routes.post("/api/consent")
def consent(body: LanguageRequest, response: Response, study: Served, rater: WritingRater) -> dict[str, Any]:
    """Note the rater's consent, given in a language."""
    response.headers.update(_NO_STORE)
    return _turn_json(study, study.votes.consent(rater, _language(study, body.language)))


@routes.post("/api/begin")
def begin(response: Response, study: Served, rater: WritingRater) -> dict[str, Any]:
    """Note that the rater has read the instructions."""
    response.headers.update(_NO_STORE)
    return _turn_json(study, study.votes.begin(rater))


@routes.post("/api/language")
def language(body: LanguageRequest, response: Response, study: Served, rater: WritingRater) -> dict[str, Any]:
    """Keep the language that the rater chose."""
    response.headers.update(_NO_STORE)
    study.votes.set_language(rater, _language(study, body.language))
    return {}


@routes.get("/api/next")
def upcoming(response: Response, study: Served, rater: Rater) -> dict[str, Any]:
    """Where the rater stands, with the pairs to show."""
    response.headers.update(_NO_STORE)
    return _turn_json(study, study.votes.turn(rater))


@routes.post("/api/vote")
def vote(body: VoteRequest, response: Response, study: Served, rater: WritingRater) -> dict[str, Any]:
    """Record a vote and hand out the next pair; the same vote sent again gets the same answer."""
    response.headers.update(_NO_STORE)
    if set(body.choices) != set(study.design.criteria):
        raise HTTPException(422, "wrong-request")
    _language(study, body.language)
    recorded, turn = study.votes.vote(rater, Ballot(**body.model_dump()))
    return {
        "recorded": {"assignment_id": recorded.assignment_id, "choices": recorded.choices},
        "feedback": _feedback(recorded),
        "turn": _turn_json(study, turn),
    }


@routes.post("/api/undo")
def undo(body: UndoRequest, response: Response, study: Served, rater: WritingRater) -> dict[str, Any]:
    """Take back the rater's last vote."""
    response.headers.update(_NO_STORE)
    return {"turn": _turn_json(study, study.votes.undo(rater, body.key))}


def _turn_json(study: ServedStudy, turn: Turn) -> dict[str, Any]:
    items = []
    for item in turn.items:
        left, right = study.image_ids(item)
        prompt = study.design.pair(item.pair_id).prompt
        practice = item.kind == "practice"  # gold and repeats are not told
        items.append(
            {"assignment_id": item.assignment_id, "prompt": prompt, "left": left, "right": right, "practice": practice}
        )
    return {
        "phase": turn.phase,
        "done": turn.done,
        "total": turn.total,
        "practice_done": turn.practice_done,
        "practice_total": turn.practice_total,
        "seconds_left": turn.seconds_left,
        "undo": turn.undo,
        "items": items,
    }


def _feedback(recorded: Recorded) -> dict[str, Any] | None:
    if recorded.better is None or not recorded.choices:
        return None
    return {"better": recorded.better, "correct": all(c == recorded.better for c in recorded.choices.values())}


def _language(study: ServedStudy, name: str) -> str:
    if name not in study.design.wording:
        raise HTTPException(422, "wrong-request")
    return name


def _cookie_name(study: ServedStudy) -> str:
    return f"study_{study.id}"  # cookies don't keep ports apart: two studies on one host must not share a name


def _set_cookie(request: Request, response: Response, study: ServedStudy, rater: str) -> None:
    response.set_cookie(
        _cookie_name(study),
        make_cookie(study.key, rater),
        max_age=_COOKIE_SECONDS,
        httponly=True,
        samesite="lax",  # a link in a mail must bring its rater along
        secure=request.url.scheme == "https",
    )


def _address(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def _link_page(string: str, study: ServedStudy) -> HTMLResponse:
    """A page that says in every language why a link does not work."""
    lines = "".join(
        f'<p lang="{name}">{escape(catalogue()[name]["page"][string])}</p>' for name in study.design.wording
    )
    style = "font: 1.1rem/1.6 system-ui, sans-serif; max-width: 32rem; margin: 15vh auto; padding: 0 1rem"
    return HTMLResponse(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Study</title>'
        f'<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f'<body style="{style}"><main>{lines}</main></body></html>',
        403,
        headers=_NO_STORE,
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400:  # a body that can't be read at all
        return JSONResponse({"error": "wrong-request"}, 422)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _wrong_request(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "wrong-request"}, 422)


def _answering(status: int, code: str) -> Any:
    async def answer(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": code}, status)

    return answer
