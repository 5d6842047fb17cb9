"""The HTTP application: health, models, chat completions; an engine answers."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.formats import Message
from safe_rlhf_jax.data.records import Unusable, brief
from safe_rlhf_jax.data.turns import turns_of
from safe_rlhf_jax.serving.answers import Job, Piece
from safe_rlhf_jax.serving.engine import Engine, FullError
from safe_rlhf_jax.serving.protocol import ChatRequest, Refused, Reply, read_request

MAX_BODY = 2**20  # bytes


def make_app(engine: Engine, model: str, key: str | None) -> Starlette:
    """Returns the application.

    Args:
        engine: Answers requests; it is started and closed elsewhere.
        model: Name of its policy.
        key: That requests must carry; None: no request needs one.
    """

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": len(engine.waiting)})

    async def models(request: Request) -> Response:
        check_key(request, key)
        wanted = request.path_params.get("model", model)
        check_model(wanted, model)
        card = {"id": model, "object": "model", "created": 0, "owned_by": "safe_rlhf_jax"}
        return JSONResponse(card if "model" in request.path_params else {"object": "list", "data": [card]})

    async def chat_completions(request: Request) -> Response:
        check_key(request, key)
        asked = read_request(await body_of(request))
        check_model(asked.model, model)
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        turns, prompt = await asyncio.to_thread(read_prompt, engine, asked)
        job = Job(
            turns,
            prompt,
            lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece),
            max_tokens=response_limit(engine, asked),
            n=answers_limit(engine, asked),
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=secrets.randbits(32) if asked.seed is None else asked.seed,
            stops=tuple(asked.stop),
        )
        try:
            engine.submit(job)
        except FullError:
            limit = engine.limits.queue
            text = f"{limit} requests are waiting, and no more can; try again later"
            raise Refused(429, text, code="queue_full", retry_after=str(engine.retry_after)) from None
        reply = Reply(model, len(prompt))
        if asked.stream:
            events = server_sent(reply, job, pieces, with_usage=asked.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        answer = asyncio.ensure_future(whole_answer(reply, job, pieces))
        gone = asyncio.ensure_future(disconnection(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await answer) if answer.done() else Response(status_code=499)  # nobody reads it
        finally:
            job.cancelled = True
            answer.cancel()
            gone.cancel()

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", models),
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        ],
        exception_handlers={Refused: refusal, HTTPException: refusal, Exception: failure},
    )


def check_key(request: Request, key: str | None) -> None:
    """Refuses a request without the key; how long that takes does not tell how much of it is right."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if key is not None and not (scheme.lower() == "bearer" and secrets.compare_digest(given.encode(), key.encode())):
        text = "the key is wrong" if given else "a key is needed: Authorization: Bearer KEY"
        raise Refused(401, text, code="invalid_api_key", www_authenticate="Bearer")


def check_model(name: str, model: str) -> None:
    """Refuses the name of another model."""
    if name != model:
        raise Refused(404, f"model: {brief(name)}: here is {model!r} only", param="model", code="model_not_found")


async def body_of(request: Request) -> Any:
    """Returns the parsed JSON of a request.

    Raises:
        Refused: If it is too large, or no JSON.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise Refused(413, f"the body is larger than {MAX_BODY} bytes", code="body_too_large", connection="close")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}", code="invalid_json") from error


def read_prompt(engine: Engine, asked: ChatRequest) -> tuple[list[Message], list[int]]:
    """Returns the turns of a request and their token ids.

    Raises:
        Refused: If the policy cannot read them, or they are too long.
    """
    try:
        turns = turns_of(asked.messages, "messages")
        if turns[-1]["role"] != "user":
            raise Unusable(f"the last turn is from {turns[-1]['role']}, and has to be from user")
        prompt = encode(turns, engine.policy.template, engine.policy.tokenizer).ids
    except Unusable as error:
        raise Refused(400, f"messages: {error}", param="messages", code="invalid_value") from error
    if len(prompt) > engine.limits.prompt:
        text = f"messages: {len(prompt)} tokens, more than the limit of {engine.limits.prompt}"
        raise Refused(400, text, param="messages", code="context_length_exceeded")
    return turns, prompt


def response_limit(engine: Engine, asked: ChatRequest) -> int:
    """Returns the most tokens of a response."""
    most = engine.limits.response
    for field in ("max_completion_tokens", "max_tokens"):
        wanted = getattr(asked, field)
        if wanted is not None and wanted > most:
            raise Refused(400, f"{field}: {wanted}, more than the limit of {most}", param=field, code="invalid_value")
    return asked.max_completion_tokens or asked.max_tokens or most


def answers_limit(engine: Engine, asked: ChatRequest) -> int:
    """Returns the number of answers, which have to fit into one batch."""
    most = engine.limits.batch
    if asked.n > most:
        raise Refused(400, f"n: {asked.n}, more than the limit of {most}", param="n", code="invalid_value")
    return asked.n


async def parts(job: Job, pieces: asyncio.Queue[Piece | Exception]) -> AsyncIterator[Piece]:
    """Yields the pieces of all answers to a request.

    Raises:
        Refused: If the batch failed.
    """
    ended = 0
    while ended < job.n:
        piece = await pieces.get()
        if isinstance(piece, Exception):
            raise Refused(500, "the batch failed; the server's log says why", code="internal_error")
        ended += piece.finish is not None
        yield piece


async def whole_answer(reply: Reply, job: Job, pieces: asyncio.Queue[Piece | Exception]) -> dict[str, Any]:
    """Returns the completed answer to a request."""
    texts, last = [""] * job.n, {}
    async for piece in parts(job, pieces):
        texts[piece.choice] += piece.text
        last[piece.choice] = piece
    choices = [
        choice(i, message={"role": "assistant", "content": texts[i], "refusal": None}, piece=last[i])
        for i in range(job.n)
    ]
    return reply.whole(choices, sum(piece.tokens for piece in last.values()))


def choice(index: int, piece: Piece | None = None, **content: Any) -> dict[str, Any]:
    """Returns one of the answers, or a part of one."""
    scores = {"scores": piece.scores} if piece and piece.scores else {}
    return {"index": index, "logprobs": None, "finish_reason": piece and piece.finish} | content | scores


async def server_sent(
    reply: Reply, job: Job, pieces: asyncio.Queue[Piece | Exception], *, with_usage: bool
) -> AsyncIterator[str]:
    """Yields the events of a streamed answer."""
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    tokens = 0
    try:
        for i in range(job.n):
            yield event(reply.chunk(choice(i, delta={"role": "assistant", "content": ""}), **usage))
        async for piece in parts(job, pieces):
            if piece.text:
                yield event(reply.chunk(choice(piece.choice, delta={"content": piece.text}), **usage))
            if piece.finish:
                tokens += piece.tokens
                yield event(reply.chunk(choice(piece.choice, piece, delta={}), **usage))
        if with_usage:
            yield event(reply.chunk(usage=reply.usage(tokens)))
        yield "data: [DONE]\n\n"
    except Refused as error:
        yield event(error.body)
    finally:
        job.cancelled = True


def event(content: dict[str, Any]) -> str:
    """Returns a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


async def disconnection(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def refusal(request: Request, error: Exception) -> Response:
    """Returns the answer to a request that is refused."""
    if isinstance(error, HTTPException):
        error = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status, error.headers)


async def failure(request: Request, error: Exception) -> Response:
    """Returns the answer after an error of ours; the log has the traceback."""
    return await refusal(request, Refused(500, "an error of the server; its log says which", code="internal_error"))
