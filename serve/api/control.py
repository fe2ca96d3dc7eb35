"""ControlService: says what the server is and how busy it is, cancels requests by their ids, and loads adapters."""

from __future__ import annotations

import asyncio
import contextlib
from importlib.metadata import version
from typing import Any

import grpc
import jax

from isthmus.adapters import AdapterInfo
from isthmus.errors import FailedPrecondition, InvalidRequest
from isthmus.proto_adapters import adapter_message
from isthmus.serve.api.adapter_root import AdapterRoot
from isthmus.serve.api.errors import abort, invalid
from isthmus.serve.api.session import Session
from isthmus.serve.engine.engine import Engine
from isthmus.serve.prepare import adapters
from isthmus.v1 import control_pb2 as pb
from isthmus.v1 import control_pb2_grpc

MAX_CANCELS = 1024
"""Most ids of a call of Cancel"""
SHORTEST_WATCH, LONGEST_WATCH = 0.1, 3600.0
"""Seconds between two snapshots of WatchLoad"""


def _value(names: Any, name: str) -> Any:
    """The value of an enum that has this name in capitals; its first, which says nothing, if none has."""
    return names.Value(name.upper()) if name.upper() in names.keys() else 0  # noqa: SIM118


class ControlService(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, session: Session) -> None:
        self._session = session

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        engine = await self._session.ready_engine(context)
        model = self._session.model
        config = model.config
        cache_dtype = engine.executor.served.cache_dtype
        return pb.GetModelInfoResponse(
            name=model.name,
            parameters=config.parameters,
            vocab_size=model.tokenizer.vocab_size,
            context_length=engine.config.context_length,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=_value(pb.Dtype, f"DTYPE_{model.execution.dtype}"),
            cache_dtype=_value(pb.Dtype, f"DTYPE_{cache_dtype}"),
            eos_token_ids=sorted(model.tokenizer.eos_ids),
            embedding_size=config.dim,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        engine = await self._session.ready_engine(context)
        devices = engine.executor.mesh.devices.flat
        return pb.GetServerInfoResponse(
            version=version("isthmus"),
            jax_version=jax.__version__,
            platform=_value(pb.Platform, f"PLATFORM_{devices[0].platform}"),
            devices=[device.device_kind for device in devices],
            buckets=[bucket.tokens for bucket in engine.config.buckets],
            page_size=engine.config.page_size,
            pages_total=engine.config.pages - 1,
            max_sequences=engine.config.max_sequences,
            compile_seconds=engine.executor.compile_seconds,
            warmup_seconds=engine.executor.warmup_seconds,
            max_adapters=engine.adapters.places,
            adapter_rank=engine.executor.model.lora.rank if engine.adapters.places else 0,
        )

    async def GetLoad(self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(load=self._load(await self._session.ready_engine(context)))

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: grpc.aio.ServicerContext) -> None:
        engine = await self._session.ready_engine(context)
        seconds = request.interval.ToNanoseconds() / 1e9 if request.HasField("interval") else 1.0
        if not SHORTEST_WATCH <= seconds <= LONGEST_WATCH:
            await abort(context, invalid("interval", f"must be {SHORTEST_WATCH:g} to {LONGEST_WATCH:g} seconds"))
        while not self._session.closing.is_set():
            await context.write(pb.WatchLoadResponse(load=self._load(engine)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._session.closing.wait(), seconds)

    def _load(self, engine: Engine) -> pb.Load:
        load, report_cached = engine.load(), self._session.report_cached
        return pb.Load(
            running=load.running,
            waiting=load.waiting,
            pages_total=load.pages_total,
            pages_in_use=load.pages_in_use,
            pages_cached=load.pages_cached if report_cached else 0,
            prompt_tokens=load.counters.prompt_tokens,
            cached_prompt_tokens=load.counters.cached_prompt_tokens if report_cached else 0,
            completion_tokens=load.counters.completion_tokens,
            preemptions=load.counters.preemptions,
            steps=load.counters.steps,
            recompilations=load.recompilations,
            draining=load.draining,
            drafted_tokens=load.counters.drafted_tokens,
            accepted_tokens=load.counters.accepted_tokens,
            recalled_tokens=load.counters.recalled_tokens if report_cached else 0,
            accepted_recalled_tokens=load.counters.accepted_recalled_tokens if report_cached else 0,
        )

    async def Cancel(self, request: pb.CancelRequest, context: grpc.aio.ServicerContext) -> pb.CancelResponse:
        engine = await self._session.ready_engine(context)
        if not 1 <= len(request.request_ids) <= MAX_CANCELS:
            await abort(context, invalid("request_ids", f"must hold 1 to {MAX_CANCELS} ids"))
        return pb.CancelResponse(
            cancelled_request_ids=[i for i in dict.fromkeys(request.request_ids) if engine.cancel(i)]
        )

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAdaptersResponse:
        engine = await self._session.ready_engine(context)
        return pb.ListAdaptersResponse(adapters=map(adapter_message, adapters.all_of(engine)))

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.LoadAdapterResponse:
        engine, root = await self._session.ready_engine(context), self._adapter_root()

        def load() -> AdapterInfo:
            try:
                return adapters.loaded(self._session.model, engine, request.name, root.folder(request.path))
            except InvalidRequest as error:
                raise type(error)(error.field, root.told(error.message)) from None

        return pb.LoadAdapterResponse(adapter=adapter_message(await self._session.loading.run(0, load, always=True)))

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> pb.UnloadAdapterResponse:
        engine = await self._session.ready_engine(context)
        self._adapter_root()
        return pb.UnloadAdapterResponse(adapter=adapter_message(adapters.unloaded(engine, request.name)))

    def _adapter_root(self) -> AdapterRoot:
        if (root := self._session.adapter_root) is None:
            raise FailedPrecondition(
                "adapters are loaded and unloaded where the server was started with --adapter-root"
            )
        return root
