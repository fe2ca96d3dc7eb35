"""ControlService: says what the server is and how busy it is, and cancels requests by their ids."""

from __future__ import annotations

from importlib.metadata import version

import grpc
import jax

from isthmus.serve.api.errors import abort, invalid
from isthmus.serve.api.session import Session
from isthmus.v1 import control_pb2 as pb
from isthmus.v1 import control_pb2_grpc

MAX_CANCELS = 1024


class ControlService(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, session: Session) -> None:
        self._session = session

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        engine = await self._session.ready_engine(context)
        model = self._session.model
        config = model.config
        return pb.GetModelInfoResponse(
            name=model.name,
            parameters=config.parameters,
            vocab_size=model.tokenizer.vocab_size,
            context_length=engine.config.context_length,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            dtype=model.execution.dtype,
            eos_token_ids=sorted(model.tokenizer.eos_ids),
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        engine = await self._session.ready_engine(context)
        devices = engine.executor.mesh.devices.flat
        return pb.GetServerInfoResponse(
            version=version("isthmus"),
            jax_version=jax.__version__,
            platform=devices[0].platform,
            devices=[device.device_kind for device in devices],
            buckets=[bucket.tokens for bucket in engine.config.buckets],
            page_size=engine.config.page_size,
            pages_total=engine.config.pages - 1,
            max_sequences=engine.config.max_sequences,
            compile_seconds=engine.executor.compile_seconds,
            warmup_seconds=engine.executor.warmup_seconds,
        )

    async def GetLoad(self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext) -> pb.GetLoadResponse:
        load = (await self._session.ready_engine(context)).load()
        report_cached = self._session.report_cached
        return pb.GetLoadResponse(
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
        )

    async def Cancel(self, request: pb.CancelRequest, context: grpc.aio.ServicerContext) -> pb.CancelResponse:
        engine = await self._session.ready_engine(context)
        if not 1 <= len(request.request_ids) <= MAX_CANCELS:
            await abort(context, invalid("request_ids", f"must hold 1 to {MAX_CANCELS} ids"))
        return pb.CancelResponse(
            cancelled_request_ids=[i for i in dict.fromkeys(request.request_ids) if engine.cancel(i)]
        )
