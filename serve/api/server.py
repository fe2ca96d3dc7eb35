"""The gRPC server: one event loop for the API, the engine in its own thread, and a clean way in and out."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from isthmus.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from model.config import ConfigError
from model.folder import ModelFolder
from model.sharding import MeshShape
from serve.api.auth import TokenAuth
from serve.api.config import ServeConfig
from serve.api.control import ControlService
from serve.api.inference import InferenceService
from serve.api.listen import target
from serve.api.session import Session
from serve.engine.build import build_engine

T = TypeVar("T")

SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in ((inference_pb2, "InferenceService"), (control_pb2, "ControlService"))
)

POLL_SECONDS = 0.05
CANCEL_GRACE_SECONDS = 2.0
"""What calls have left to end in when draining has taken too long."""

_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a silent split of the traffic
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_metadata_size", 16 << 10),
)


async def _in_daemon_thread(work: Callable[..., T], *args: Any) -> T:
    """work(*args) on a thread that doesn't keep the process from ending: compiling can't be interrupted."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if not done.cancelled():
            done.set_exception(error) if error is not None else done.set_result(cast(T, result))

    def run() -> None:
        result, error = None, None
        try:
            result = work(*args)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await done


class Server:
    """Health says NOT_SERVING from `start` until `load` is through, and again from `stop` on."""

    def __init__(self, config: ServeConfig, model: ModelFolder) -> None:
        """Must be made on the event loop that it will run on. Raises ConfigError."""
        config.validate()
        self.config = config
        self.session = Session(model, asyncio.get_running_loop())
        token = config.read_token()
        self._server = grpc.aio.server(interceptors=[TokenAuth(token)] if token else [], options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        self.port = 0

    async def start(self) -> None:
        """Binds the port and answers; generation is UNAVAILABLE until `load` is through. Raises ConfigError."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(self.session), self._server)
        control_pb2_grpc.add_ControlServiceServicer_to_server(ControlService(self.session), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, reflection.SERVICE_NAME, health.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = target(self.config.host, self.config.port)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            self.port = 0
        if self.port == 0:
            raise ConfigError(f"port={self.config.port} on host={self.config.host} can't be listened on; is it taken?")
        await self._server.start()

    async def load(self, tick: Callable[[str], None] = lambda text: None) -> None:
        """Loads parameters and compiles every program, then says SERVING. Raises ConfigError."""
        build = (
            self.session.model,
            self.config.engine,
            MeshShape(tp=self.config.tp, ep=self.config.ep),
            self.session.sink,
            tick,
        )
        engine = await _in_daemon_thread(build_engine, *build)
        engine.start()
        self.session.engine = engine
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def run(self) -> bool:
        """Serves until SIGTERM or SIGINT, then drains. Whether the engine was alive to the end."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        while not stop.is_set() and self.session.engine is not None and self.session.engine.alive:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), timeout=0.5)
        alive = self.session.engine is None or self.session.engine.alive
        await self.stop()
        return alive

    async def stop(self) -> None:
        """Health NOT_SERVING and nothing new at once; what is in flight has drain_seconds to finish."""
        await self._health.enter_graceful_shutdown()
        engine = self.session.engine
        if engine is not None:
            engine.drain()
            deadline = asyncio.get_running_loop().time() + self.config.drain_seconds
            while engine.in_flight and engine.alive and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.to_thread(engine.close)  # what is left is told CANCELLED
        await self._server.stop(CANCEL_GRACE_SECONDS)

    async def _set_health(self, status: int) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, status)
