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
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from threading import Semaphore
from types import NoneType
from typing import Any, Generic, Literal, TypeVar, get_args

import jax

from isthmus.adapters import AdapterInfo, check_path
from isthmus.arguments import shown
from isthmus.errors import ConfigError, DeadlineExceeded, RequestFailed, Unavailable
from isthmus.forms import check_string
from isthmus.model.device.compilation import enable_compilation_cache
from isthmus.model.sharding import MeshShape
from isthmus.model.weights.folder import ModelFolder
from isthmus.model.weights.hub import FolderOptions
from isthmus.protocol import AsyncModel, Model
from isthmus.scores import Embedding, EmbedQuestion, Score, ScoreQuestion
from isthmus.serve.engine.build import build_engine, open_model
from isthmus.serve.engine.config import EngineConfig
from isthmus.serve.engine.engine import Engine
from isthmus.serve.engine.messages import End, Request
from isthmus.serve.prepare import adapters
from isthmus.serve.prepare.choices import Choices, completion_of_all
from isthmus.serve.prepare.delivery import Last, LoopStream, Receiver, ThreadStream, deliver
from isthmus.serve.prepare.reader import Reader
from isthmus.serve.prepare.request import Preparation, detokenized, tokenized
from isthmus.serve.prepare.scores import embed_request, embedding_of, score_requests, scores_of
from isthmus.serve.prepare.workers import Workers
from isthmus.types import Completion, Conversation, Delta, Question, TextPrompt, TokenPrompt, check_sized

R = TypeVar("R")
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
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
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
        split the model over; by default one. kernels: "auto", "reference", or a name, and single operations after it,
        as for `isthmus serve --kernels`. engine: the engine's sizes. adapters: folders of LoRA adapters of the model,
        by names; a question whose `model` is one of these names is computed with that adapter (`load_adapter` brings
        more). merge_adapter: add an adapter to its base model's weights once. base: the folder or Org/Name of an
        adapter's base model. ignore_field: fields of config.json to read as if absent. download: fetch an Org/Name that
        the local cache lacks. compilation_cache: folder for compiled programs; by default the one that JAX is set to,
        or ~/.cache/isthmus/xla. progress: whether to show how loading goes; None shows it if standard error is a
        terminal.

        Raises ConfigError, naming the setting, and CheckpointError for a folder whose weights can't be read.
        """
        _check("dtype", dtype, get_args(Dtype))
        _check("quantize", quantize, get_args(Quantize))
        for name, value, kinds in (
            ("path", path, (str, os.PathLike)),
            ("mesh", mesh, (MeshShape, NoneType)),
            ("kernels", kernels, (str,)),
            ("engine", engine, (EngineConfig, NoneType)),
            ("merge_adapter", merge_adapter, (bool,)),
            ("base", base, (str, os.PathLike, NoneType)),
            ("adapters", adapters, (Mapping, NoneType)),
            ("ignore_field", ignore_field, (list, tuple)),
            ("download", download, (bool,)),
            ("compilation_cache", compilation_cache, (str, os.PathLike, NoneType)),
            ("progress", progress, (bool, NoneType)),
        ):
            _check_type(name, value, kinds)
        for name, folder in (adapters or {}).items():
            _check_type(f"adapters: the name {shown(name)}", name, (str,))
            _check_type(f"adapters: the folder of {name!r}", folder, (str, os.PathLike))
        _keep_programs(compilation_cache)
        options = FolderOptions(None if base is None else Path(base), tuple(ignore_field), download)
        self._model = open_model(
            Path(path),
            dtype,
            merge_adapter=merge_adapter,
            quantize=quantize,
            adapters={name: Path(folder) for name, folder in (adapters or {}).items()},
            options=options,
        )
        for remark in self._model.remarks:
            logger.warning("%s", remark)
        self._engine = _load(self._model, engine or EngineConfig(), mesh or MeshShape(), kernels, progress)
        self._preparation = Preparation.of(self._model, self._engine)
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

    def begin(self, question: Question, timeout: float | None = None) -> _Begun[Completion]:
        self._check_open()
        return self._whole(self._preparation.requests(question, deadline=_deadline(timeout)), timeout)

    def begin_score(self, question: ScoreQuestion, timeout: float | None = None) -> _Begun[list[Score]]:
        self._check_open()
        return self._scoring(
            question, score_requests(self._preparation, question, deadline=_deadline(timeout)), timeout
        )

    def begin_embed(self, question: EmbedQuestion, timeout: float | None = None) -> _Begun[Embedding]:
        self._check_open()
        return self._embedding(
            question, embed_request(self._preparation, question, deadline=_deadline(timeout)), timeout
        )

    def follow(self, question: Question, timeout: float | None = None) -> Generator[Delta, None, None]:
        self._check_open()
        deadline = _deadline(timeout)
        events = ThreadStream()
        requests = self._submitted(self._preparation.requests(question, deadline=deadline), lambda _: events)
        choices = Choices(self._model.tokenizer, requests, self._engine.cancel)
        try:
            while not choices.ended:
                for delta in choices.take([events.get(_left(deadline))]):
                    if _says_something(delta):
                        yield delta
        except queue.Empty:
            raise DeadlineExceeded.after(timeout) from None
        finally:
            self._cancel(requests)

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        self._check_open()
        return tokenized(self._model.tokenizer, text, parse_special=parse_special)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        self._check_open()
        return detokenized(self._model.tokenizer, token_ids)

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        self._check_open()
        return adapters.loaded(self._model, self._engine, name, Path(check_path(path)))

    def unload_adapter(self, name: str) -> AdapterInfo:
        self._check_open()
        return adapters.unloaded(self._engine, name)

    def list_adapters(self) -> list[AdapterInfo]:
        self._check_open()
        return adapters.all_of(self._engine)

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

    def _whole(self, requests: Sequence[Request], timeout: float | None) -> _Begun[Completion]:
        """Hands over the requests of a question for a completion."""
        submitted = self._submitted(requests, lambda request: self._reader.receiver(request.text_options))
        futures: list[Future[Completion]] = [request.reply_to.completion for request in submitted]
        return _Begun(self._engine, submitted, futures, completion_of_all, timeout)

    def _scoring(
        self, question: ScoreQuestion, requests: Sequence[Request], timeout: float | None
    ) -> _Begun[list[Score]]:
        return self._last(requests, timeout, lambda asked, ends: scores_of(asked, ends, question))

    def _embedding(self, question: EmbedQuestion, request: Request, timeout: float | None) -> _Begun[Embedding]:
        return self._last([request], timeout, lambda asked, ends: embedding_of(asked[0], ends[0], question))

    def _last(
        self,
        requests: Sequence[Request],
        timeout: float | None,
        answer: Callable[[Sequence[Request], Sequence[End]], T],
    ) -> _Begun[T]:
        """Hands over requests whose ends have what is asked for. answer: makes that of them."""
        submitted = self._submitted(requests, lambda _: Last())
        ends: list[Future[End]] = [request.reply_to.end for request in submitted]
        return _Begun(self._engine, submitted, ends, partial(answer, submitted), timeout)

    def _submitted(self, requests: Sequence[Request], receiver: Callable[[Request], Receiver]) -> list[Request]:
        self._check_open()
        submitted = [dataclasses.replace(request, reply_to=receiver(request)) for request in requests]
        self._engine.submit(*submitted)
        return submitted

    def _cancel(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._engine.cancel(request)


class _Begun(Generic[T]):
    """A question's requests in the engine."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        futures: Sequence[Future[Any]],
        convert: Callable[[list[Any]], T],
        timeout: float | None,
    ) -> None:
        """futures: what each request gives. convert: makes the result of that."""
        self._engine, self._requests, self._timeout = engine, requests, timeout
        self._futures, self._convert = futures, convert

    def result(self) -> T:
        deadline = self._requests[0].deadline
        try:
            return self._convert([future.result(_left(deadline)) for future in self._futures])
        except TimeoutError:
            raise DeadlineExceeded.after(self._timeout) from None
        finally:  # a caller that stops waiting, for example by Ctrl-C, doesn't need the requests any more
            self.cancel()

    async def result_async(self) -> T:
        """What `result` returns, awaited on an event loop."""
        try:
            return self._convert(await asyncio.gather(*map(asyncio.wrap_future, self._futures)))
        finally:
            self.cancel()

    def cancel(self) -> None:
        for request in self._requests:
            self._engine.cancel(request)

    def then(self, call: Callable[[], object]) -> None:
        left = Semaphore(len(self._futures) - 1)
        for future in self._futures:
            future.add_done_callback(lambda _: None if left.acquire(blocking=False) else call())


class AsyncLLM(AsyncModel):
    """An LLM for asyncio. It ends when its LLM is closed."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    @property
    def at_once(self) -> int:
        return self._llm.at_once

    async def ask(self, question: Question, timeout: float | None = None) -> Completion:
        llm, prompt = self._llm, question.prompt
        # A template and a grammar are programs: even a short one may take a second.
        program = isinstance(prompt, Conversation) or question.sampling.response_format is not None
        work = partial(llm._preparation.requests, question, deadline=_deadline(timeout))
        prepared = self._run(_size(prompt), work, always=program)
        return await self._ended(prepared, lambda made: llm._whole(made, timeout), timeout)

    async def ask_score(self, question: ScoreQuestion, timeout: float | None = None) -> list[Score]:
        llm, prompt = self._llm, question.prompt
        work = partial(score_requests, llm._preparation, question, deadline=_deadline(timeout))
        # The prompt is encoded with each continuation, which takes long even of a short one.
        prepared = self._run(_size(prompt), work, always=True)
        return await self._ended(prepared, lambda made: llm._scoring(question, made, timeout), timeout)

    async def ask_embed(self, question: EmbedQuestion, timeout: float | None = None) -> Embedding:
        llm, prompt = self._llm, question.prompt
        work = partial(embed_request, llm._preparation, question, deadline=_deadline(timeout))
        prepared = self._run(_size(prompt), work, always=isinstance(prompt, Conversation))
        return await self._ended(prepared, lambda made: llm._embedding(question, made, timeout), timeout)

    async def _ended(
        self, prepared: Coroutine[None, None, R], begin: Callable[[R], _Begun[T]], timeout: float | None
    ) -> T:
        """What the requests give that are `prepared` on another thread. They begin here, so that whoever is cancelled
        meanwhile leaves none behind."""
        try:
            async with asyncio.timeout(timeout):
                return await begin(await prepared).result_async()
        except TimeoutError:
            raise DeadlineExceeded.after(timeout) from None

    async def follow(self, question: Question, timeout: float | None = None) -> AsyncGenerator[Delta, None]:
        llm, deadline = self._llm, _deadline(timeout)
        prompt, events = question.prompt, LoopStream()
        program = isinstance(prompt, Conversation) or question.sampling.response_format is not None
        work = partial(llm._preparation.requests, question, deadline=deadline)
        prepared = await self._run(_size(prompt), work, always=program)
        requests = llm._submitted(prepared, lambda _: events)
        choices = Choices(llm._model.tokenizer, requests, llm._engine.cancel)
        try:
            while not choices.ended:
                try:
                    async with asyncio.timeout(_left(deadline)):
                        some = await events.some(MOST_AT_ONCE)
                except TimeoutError:
                    raise DeadlineExceeded.after(timeout) from None
                for delta in choices.take(some):
                    if _says_something(delta):
                        yield delta
        finally:
            llm._cancel(requests)

    async def tokenize(self, text: str, *, parse_special: bool = False) -> list[int]:
        work = partial(self._llm.tokenize, text, parse_special=parse_special)
        return await self._run(len(check_string("text", text)), work)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._run(len(check_sized("token_ids", token_ids)), partial(self._llm.detokenize, token_ids))

    async def load_adapter(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        self._llm._check_open()
        return await asyncio.to_thread(self._llm.load_adapter, name, path)

    async def unload_adapter(self, name: str) -> AdapterInfo:
        return self._llm.unload_adapter(name)

    async def list_adapters(self) -> list[AdapterInfo]:
        return self._llm.list_adapters()

    async def _run(self, size: int, work: Callable[[], T], *, always: bool = False) -> T:
        self._llm._check_open()
        return await self._llm._workers.run(size, work, always=always)


def _size(prompt: TextPrompt | TokenPrompt | Conversation) -> int:
    """How much there is to encode: characters of a text, or token ids."""
    match prompt:
        case TextPrompt(text):
            return len(check_string("prompt", text))
        case TokenPrompt(ids):
            return len(check_sized("prompt", ids))
        case Conversation():
            return 0


def _says_something(delta: Delta) -> bool:
    return bool(delta.completion is not None or delta.text or delta.token_ids or delta.prompt_logprobs)


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(choices)}")


def _check_type(name: str, value: object, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds):
        wanted = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
        raise ConfigError(f"{name} must be {wanted}, not {type(value).__name__}")


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
