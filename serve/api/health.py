"""grpc.health.v1. Anybody may call it, with or without a token, so a call must leave nothing behind in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health, health_pb2


class Health(health.aio.HealthServicer):
    """Health of the named services alone. The library's own servicer keeps every name that it is asked to watch."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        if request.service in self._names:
            await super().Watch(request, context)
            return
        await context.write(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN))
        await asyncio.Event().wait()  # until the call ends: the service will never come
