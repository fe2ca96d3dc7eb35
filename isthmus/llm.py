"""A model in this process, run by the engine that serves. It starts no subprocess and sets no signal handlers; any
thread and any event loop may call it."""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import logging
import os
import queue
import sys
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

import jax

from isthmus.errors import ConfigError, DeadlineExceeded, RequestFailed, Unavailable
from isthmus.forms import check_string
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.sharding import MeshShape
from isthmus.model.weights.folder import ModelFolder
from isthmus.model.weights.hub import FolderOptions
from isthmus.protocol import AsyncModel, Model
from isthmus.serve.engine.build import build_engine, open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.messages import Request
from isthmus.serve.prepare.answer import Answer
from isthmus.serve.prepare.delivery import LoopStream, ThreadStream, deliver
from isthmus.serve.prepare.reader import Reader, Whole
from isthmus.serve.prepare.request import Preparation, detokenized, tokenized
from isthmus.serve.prepare.workers import Workers
from isthmus.types import Completion, Conversation, Delta, Question, TextPrompt, TokenPrompt, check_sized

T = TypeVar("T")
Dtype = Literal["auto", "float32", "bfloat16"]
Quantize = Literal["none", "int8", "int6", "int5", "int4"]

CLOSE_SECONDS = 60.0
"""Seconds that a step under way has to end when the model is closed"""
MOST_AT_ONCE = 512
"""Most tokens that are decoded in a row on an event loop, which takes about 3 ms"""

logger = logging.getLogger("isthmus")


class LLM(Model):
    """A model, compiled and running in an engine. `close` it, or use it in a with statement.

    Of a list, as many items run at once as the engine has room for. After `close` every call raises Unavailable. Once
    an error of the device has ended the engine, calls raise RequestFailed with the reason ENGINE_DEAD and that error as
    its cause.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: Dtype = "auto",
        quantize: Quantize = "none",
        mesh: MeshShape | None = None,
        kernels: str = "auto",
        engine: EngineConfig | None = None,
        merge_adapter: bool = False,
        base: str | os.PathLike[str] | None = None,
        ignore_field: Sequence[str] = (),
        download: bool = False,
        compilation_cache: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> None:
        """path: a model folder, from `isthmus train` or as Hugging Face publishes it, an adapter's folder, a GGUF file,
        or a name like Org/Name in the local Hugging Face cache. dtype: of weights, activations and KV cache; auto is
        bfloat16, and float32 on CPU. quantize: keep matrices as integers, quantized while loading. mesh: the devices to
        split the model over; by default one. kernels: "auto", "reference", or a name, as for `isthmus serve --kernels`.
        engine: the engine's sizes. merge_adapter: add an adapter to its base model's weights once. base: the folder or
        Org/Name of an adapter's base model. ignore_field: fields of config.json to read as if absent. download: fetch
        an Org/Name that the local cache lacks. compilation_cache: folder for compiled programs; by default the one that
        JAX is set to, or ~/.cache/isthmus/xla. progress: whether to show how loading goes; None shows it if standard
        error is a terminal.

        Raises ConfigError, naming the setting, and CheckpointError for a folder whose weights can't be read.
        """
        _check("dtype", dtype, get_args(Dtype))
        _check("quantize", quantize, get_args(Quantize))
        _keep_programs(compilation_cache)
        options = FolderOptions(None if base is None else Path(base), tuple(ignore_field), download)
        self._model = open_model(Path(path), dtype, merge_adapter=merge_adapter, quantize=quantize, options=options)
        for remark in self._model.remarks:
            logger.warning("%s", remark)
        self._engine = _load(self._model, engine or EngineConfig(), mesh or MeshShape(), kernels, progress)
        self._preparation = Preparation.of(self._model, self._engine.config.context_length)
        self._workers = Workers()
        self._reader = Reader(self._model.tokenizer, self._engine.cancel)
        self._process = os.getpid()
        self._closing = weakref.finalize(self, _close, self._engine, self._workers, self._reader, self._process)
        self._closing.atexit = False
        atexit.register(self._closing)  # runs before JAX's exit handler, which was registered earlier

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and completion together."""
        return self._engine.config.context_length

    @property
    def at_once(self) -> int:
        """Most items of a list that are asked at once: as many as the engine runs, and as many again that wait, so that
        no slot is ever empty."""
        engine = self._engine.config
        return engine.max_sequences + min(engine.max_sequences, engine.max_waiting)

    @cached_property
    def aio(self) -> AsyncLLM:
        """This model for asyncio, on any event loops that call it."""
        return AsyncLLM(self)

    def begin(self, question: Question, timeout: float | None = None) -> _Begun:
        self._check_open()
        prepared = self._preparation.request(question, deadline=_deadline(timeout))
        return _Begun(self._engine, self._whole(prepared), timeout)

    def follow(self, question: Question, timeout: float | None = None) -> Generator[Delta, None, None]:
        self._check_open()
        deadline = _deadline(timeout)
        events = ThreadStream()
        request = self._submitted(self._preparation.request(question, deadline=deadline), events)
        answer, ended = Answer(self._model.tokenizer, request), False
        try:
            while not ended:
                delta = answer.take([events.get(_left(deadline))])
                if ended := delta.completion is not None:  # by a stop string, which the engine doesn't know of
                    self._engine.cancel(request)
                if ended or delta.text or delta.token_ids:
                    yield delta
        except queue.Empty:
            raise _too_late(timeout) from None
        finally:
            self._engine.cancel(request)

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        self._check_open()
        return tokenized(self._model.tokenizer, text, parse_special=parse_special)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        self._check_open()
        return detokenized(self._model.tokenizer, token_ids)

    def close(self) -> None:
        """Ends requests in flight with Unavailable, and frees the device's memory. A second call does nothing.

        Raises RequestFailed if the step under way doesn't end; the memory is then not freed.
        """
        atexit.unregister(self._closing)
        self._closing()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._closing.alive:
            raise Unavailable("this model was closed", None)
        if self._process != os.getpid():  # the engine's thread isn't there, so nothing would ever be answered
            raise Unavailable("this model was opened in another process, of which this is a fork: open it here", None)

    def _whole(self, request: Request) -> Request:
        """Hands a request over whose reply_to is to have its completion."""
        return self._submitted(request, self._reader.receiver(request.text_options))

    def _submitted(self, request: Request, receiver: Whole | ThreadStream | LoopStream) -> Request:
        self._check_open()
        request = dataclasses.replace(request, reply_to=receiver)
        self._engine.submit(request)
        return request


class _Begun:
    """A request in the engine."""

    def __init__(self, engine: Engine, request: Request, timeout: float | None) -> None:
        self._engine, self._request, self._timeout = engine, request, timeout
        self._completion: Future[Completion] = request.reply_to.completion

    def result(self) -> Completion:
        try:
            return self._completion.result(_left(self._request.deadline))
        except TimeoutError:
            raise _too_late(self._timeout) from None
        finally:  # a caller that stops waiting, for example by Ctrl-C, doesn't need the request any more
            self.cancel()

    def cancel(self) -> None:
        self._engine.cancel(self._request)

    def then(self, call: Callable[[], object]) -> None:
        self._completion.add_done_callback(lambda _: call())


class AsyncLLM(AsyncModel):
    """An LLM for asyncio. It ends when its LLM is closed."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    @property
    def at_once(self) -> int:
        return self._llm.at_once

    async def ask(self, question: Question, timeout: float | None = None) -> Completion:
        llm = self._llm
        try:
            async with asyncio.timeout(timeout):
                request = llm._whole(await self._prepared(question, _deadline(timeout)))
                completion: Future[Completion] = request.reply_to.completion
                try:
                    return await asyncio.wrap_future(completion)
                finally:
                    llm._engine.cancel(request)
        except TimeoutError:
            raise _too_late(timeout) from None

    async def follow(self, question: Question, timeout: float | None = None) -> AsyncGenerator[Delta, None]:
        llm, deadline = self._llm, _deadline(timeout)
        request = await self._prepared(question, deadline)
        events = LoopStream()
        request = llm._submitted(request, events)
        answer, ended = Answer(llm._model.tokenizer, request), False
        try:
            while not ended:
                try:
                    async with asyncio.timeout(_left(deadline)):
                        some = await events.some(MOST_AT_ONCE)
                except TimeoutError:
                    raise _too_late(timeout) from None
                delta = answer.take(some)
                if ended := delta.completion is not None:
                    llm._engine.cancel(request)
                if ended or delta.text or delta.token_ids:
                    yield delta
        finally:
            llm._engine.cancel(request)

    async def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        work = partial(self._llm.tokenize, text, parse_special=parse_special)
        return await self._run(len(check_string("text", text)), work)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._run(len(check_sized("token_ids", token_ids)), partial(self._llm.detokenize, token_ids))

    async def _prepared(self, question: Question, deadline: float | None) -> Request:
        prompt = question.prompt
        # A template and a grammar are programs: even a short one may take a second.
        program = isinstance(prompt, Conversation) or question.sampling.response_format is not None
        size = len(check_string("prompt", prompt.text)) if isinstance(prompt, TextPrompt) else 0
        size = len(check_sized("prompt", prompt.ids)) if isinstance(prompt, TokenPrompt) else size
        work = partial(self._llm._preparation.request, question, deadline=deadline)
        return await self._run(size, work, always=program)

    async def _run(self, size: int, work: Callable[[], T], *, always: bool = False) -> T:
        self._llm._check_open()
        return await self._llm._workers.run(size, work, always=always)


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(choices)}")


def _keep_programs(folder: str | os.PathLike[str] | None) -> None:
    """Sets the folder for compiled programs. None keeps the one that JAX is set to, if there is one."""
    if folder is None and jax.config.jax_compilation_cache_dir is not None:
        return
    if warning := enable_compilation_cache(None if folder is None else Path(folder)):
        logger.warning("%s", warning)


def _load(model: ModelFolder, engine: EngineConfig, mesh: MeshShape, kernels: str, progress: bool | None) -> Engine:
    with _shown(progress) as show:
        model.tokenizer.prepare()
        built = build_engine(model, engine, mesh, deliver, show, kernels=kernels)
    built.start()
    return built


@contextmanager
def _shown(progress: bool | None) -> Iterator[Callable[[str], None]]:
    """Yields a function that shows a text about how loading goes, or does nothing. progress: as in LLM."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda text: None
        return
    from isthmus.model.process.progress import Display, working

    with working(Display(stderr=True, soft_wrap=True), "loading") as show:
        yield show


def _close(engine: Engine, workers: Workers, reader: Reader, process: int) -> None:
    """process: the one that opened it; in a fork of that nothing is closed, whose threads and locks it doesn't have."""
    if process != os.getpid():
        return
    workers.close()
    ended = engine.close(CLOSE_SECONDS)
    reader.close()
    if not ended:
        raise RequestFailed(f"the step under way hasn't ended in {CLOSE_SECONDS:g} s: the device's memory is not freed")
    engine.executor.free()


def _deadline(timeout: float | None) -> float | None:
    """On the engine's clock."""
    return None if timeout is None else time.perf_counter() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.perf_counter())


def _too_late(timeout: float | None) -> DeadlineExceeded:
    return DeadlineExceeded(f"the request hasn't ended in {timeout} s")
