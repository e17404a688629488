"""The study's HTTP service: join, next, vote, images, health. It knows nothing of the page that calls it.

No answer holds a model's name, a file name or a path. Who a rater is, is in an HttpOnly cookie; a handler acts only on
that rater's own assignments.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hypersd_bench.errors import HypersdBenchError
from user_study.study import Study
from user_study.votes import Turn, UnknownAssignment

MAX_BODY_BYTES = 16 * 1024
_COOKIE_SECONDS = 90 * 24 * 3600
_DAY_MS = 24 * 3600 * 1000
_NO_STORE = {"Cache-Control": "no-store"}
_IMAGE_HEADERS = {"Cache-Control": "private, max-age=31536000, immutable", "Content-Disposition": "inline"}

routes = APIRouter()


class VoteRequest(BaseModel):
    """What a browser sends for a vote; anything more, less or different is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    assignment_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{10,40}$")]
    choice: Literal["left", "right", "tie"]
    response_ms: Annotated[int, Field(ge=0, le=_DAY_MS)]


class Guard:
    """Refuse large bodies before anything reads them, and send the same security headers with every answer."""

    _headers = (
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-frame-options", b"DENY"),
    )

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 411 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        status = _body_status(dict(scope["headers"]))
        app = self._app if status is None else PlainTextResponse("request body too large or of unknown size", status)
        await app(scope, receive, send_guarded)


def create_service(study: Study) -> FastAPI:
    """Build the service of an opened study; ``/study`` is left to the page."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.study = study
    app.add_middleware(Guard)
    app.include_router(routes)
    return app


async def served_study(request: Request) -> Study:
    """The study that this application serves."""
    study: Study = request.app.state.study
    return study


Served = Annotated[Study, Depends(served_study)]


def known_rater(request: Request, study: Served) -> str | None:
    """The id of the rater whose cookie came with the request, if any."""
    token = request.cookies.get(_cookie_name(study))
    return study.votes.rater(token) if token else None


Known = Annotated[str | None, Depends(known_rater)]


def joined_rater(known: Known) -> str:
    """The rater's id; 401 for anybody who has not joined."""
    if known is None:
        raise HTTPException(401, "join first")
    return known


Rater = Annotated[str, Depends(joined_rater)]


@routes.get("/")
async def start() -> RedirectResponse:
    """Send people to the page; relative, because a proxy may serve us under a path of its own."""
    return RedirectResponse("study/")


@routes.get("/favicon.ico", status_code=204)
async def icon() -> None:
    """Browsers ask for one on their own; there is none, and no error in the console either."""


@routes.get("/livez")
async def live() -> PlainTextResponse:
    """Say that the process answers."""
    return PlainTextResponse("ok")


@routes.get("/readyz")
def ready(study: Served) -> PlainTextResponse:
    """Say whether votes can be taken."""
    try:
        study.votes.ping()
    except HypersdBenchError:
        return PlainTextResponse("the database does not answer", 503)
    return PlainTextResponse("ok")


@routes.get("/img/{image_id}")
def image(image_id: str, study: Served) -> Response:
    """An image of the study, by its opaque id."""
    file = study.images.get(image_id)
    if file is None:
        raise HTTPException(404, "no such image")
    # read and sent by hand: a file response would tell when each file was written, which tells the order
    return Response(file.read_bytes(), media_type="image/png", headers=_IMAGE_HEADERS)


@routes.post("/api/join")
def join(request: Request, response: Response, study: Served, known: Known) -> dict[str, Any]:
    """Make the caller a rater, unless the caller is one, and say what is asked."""
    if known is None:
        response.set_cookie(
            _cookie_name(study),
            study.votes.join(),
            max_age=_COOKIE_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
    response.headers.update(_NO_STORE)
    return {"study": study.id, "question": study.design.question, "instruction": study.design.instruction}


@routes.get("/api/next")
def upcoming(response: Response, study: Served, rater: Rater) -> dict[str, Any]:
    """The rater's open pair, or the next one."""
    response.headers.update(_NO_STORE)
    return _turn_json(study.votes.turn(rater))


@routes.post("/api/vote")
def vote(request: VoteRequest, response: Response, study: Served, rater: Rater) -> dict[str, Any]:
    """Record a vote and hand out the next pair; the same vote sent again gets the same answer."""
    response.headers.update(_NO_STORE)
    try:
        choice, turn = study.votes.vote(rater, request.assignment_id, request.choice, request.response_ms)
    except UnknownAssignment:
        raise HTTPException(404, "no such assignment of yours") from None
    return {"recorded": {"assignment_id": request.assignment_id, "choice": choice}, "next": _turn_json(turn)}


def _cookie_name(study: Study) -> str:
    return f"study_{study.id}"  # cookies don't keep ports apart: two studies on one host must not share a name


def _turn_json(turn: Turn) -> dict[str, Any]:
    pair = {"assignment_id": turn.assignment_id, "prompt": turn.prompt, "left": turn.left, "right": turn.right}
    return {"done": turn.done, "total": turn.total, "pair": pair if turn.assignment_id else None}


def _body_status(headers: dict[bytes, bytes]) -> int | None:
    """The status to refuse a request's body with, or None when its announced size is fine."""
    if b"transfer-encoding" in headers:
        return 411
    length = headers.get(b"content-length", b"0")
    return 413 if not length.isdigit() or int(length) > MAX_BODY_BYTES else None
