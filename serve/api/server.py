"""The gRPC server: one event loop for the API, the engine in its own thread, start and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from functools import partial

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from isthmus.errors import ConfigError
from isthmus.model.process.signals import end_at_once
from isthmus.model.weights.folder import ModelFolder
from isthmus.serve.api.auth import TokenAuth
from isthmus.serve.api.config import ServeConfig
from isthmus.serve.api.control import ControlService
from isthmus.serve.api.gate import Gate
from isthmus.serve.api.health import Health
from isthmus.serve.api.inference import InferenceService
from isthmus.serve.api.listen import target
from isthmus.serve.api.session import Session
from isthmus.serve.engine.build import build_engine
from isthmus.serve.engine.engine import Engine
from isthmus.serve.prepare.delivery import deliver
from isthmus.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

logger = logging.getLogger("isthmus.api")

SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in ((inference_pb2, "InferenceService"), (control_pb2, "ControlService"))
)

POLL_SECONDS = 0.05
WATCH_SECONDS = 0.25
"""How often the engine is checked for a stalled step"""
CANCEL_GRACE_SECONDS = 2.0
"""Seconds that calls have to end once the engine is closed"""
CLOSE_SECONDS = 5.0
"""Seconds that the engine has for its last step when it is closed"""
MAX_REQUEST_BYTES = 16 << 20
"""Most bytes of a message; fields have limits of their own, and those errors name the field"""
SPARE_CALLS = 64
"""Calls of InferenceService that may be open beyond the requests that the engine takes"""
OTHER_CALLS = 1024
"""Calls that may be open of one method of any other service"""
PING_SECONDS = 1.0
"""Least seconds between a client's pings, which ask whether the server is there"""
PING_TIMEOUT_SECONDS = 10.0


def _options(config: ServeConfig) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a silent split of the traffic
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_metadata_size", 16 << 10),
        # Beyond these gRPC cancels calls before Gate sees them. Gate's limits are lower, and it gives a reason.
        ("grpc.server.max_pending_requests", 1 << 16),
        ("grpc.server.max_pending_requests_hard_limit", 1 << 17),
        ("grpc.server_max_unrequested_time_in_server", 3600),  # else calls that we reach after 30 s end as CANCELLED
        ("grpc.keepalive_time_ms", round(1000 * config.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", round(1000 * PING_TIMEOUT_SECONDS)),
        ("grpc.http2.ping_timeout_ms", round(1000 * PING_TIMEOUT_SECONDS)),  # else a minute, whatever the keepalive
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * PING_SECONDS)),
    )


class Server:
    """Serves one model. Health says NOT_SERVING from `start` until `load` is done, and again from `stop` on."""

    def __init__(self, config: ServeConfig, model: ModelFolder) -> None:
        """Must be made on the event loop that it will run on. Raises ConfigError."""
        config.validate()
        self.config = config
        self.session = Session(model, config)
        token, self._tls = config.read_token(), config.read_tls()
        self.session.needs_token = bool(token)
        limit = config.engine.max_sequences + config.engine.max_waiting + SPARE_CALLS
        gate = Gate(self.session.workers, {SERVICES[0]: limit}, OTHER_CALLS)
        interceptors = [*([TokenAuth(token)] if token else []), gate]
        self._server = grpc.aio.server(interceptors=interceptors, options=_options(config))
        self._watching: asyncio.Task[None] | None = None
        self._health = Health(("", *SERVICES))
        self.port = 0

    async def start(self) -> None:
        """Binds the port and answers calls; generation is UNAVAILABLE until `load` is done. Raises ConfigError."""
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(self.session), self._server)
        control_pb2_grpc.add_ControlServiceServicer_to_server(ControlService(self.session), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, reflection.SERVICE_NAME, health.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = target(self.config.host, self.config.port)
        try:
            self.port = self._bind(address)
        except RuntimeError:
            self.port = 0
        if self.port == 0:
            raise ConfigError(f"port={self.config.port} on host={self.config.host} can't be listened on; is it taken?")
        await self._server.start()

    def _bind(self, address: str) -> int:
        if self._tls is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, grpc.ssl_server_credentials([self._tls]))

    async def load(self, on_progress: Callable[[str], None] = lambda text: None) -> None:
        """Loads parameters and compiles every program, then says SERVING. Raises ConfigError."""
        build = (
            self.session.model,
            self.config.engine,
            self.config.mesh_shape,
            deliver,
            on_progress,
        )
        run = partial(self.session.loading.run, 0, always=True)
        await run(self.session.model.tokenizer.prepare)
        engine = await run(partial(build_engine, kernels=self.config.kernels), *build)
        engine.start()
        self.session.engine = engine
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._watching = asyncio.create_task(self._watch(engine))

    async def _watch(self, engine: Engine) -> None:
        """Keeps health NOT_SERVING while the engine is stalled in a step."""
        stalled = False
        while engine.alive:
            await asyncio.sleep(WATCH_SECONDS)
            if self.session.stalled != stalled:
                stalled = not stalled
                status = health_pb2.HealthCheckResponse
                await self._set_health(status.NOT_SERVING if stalled else status.SERVING)
                said = f"a step has taken {engine.busy_seconds:.0f} s: NOT_SERVING" if stalled else "SERVING again"
                logger.warning(said)

    async def run(self) -> bool:
        """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once. Returns whether
        the engine was alive to the end, and has ended."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def told(number: int) -> None:
            if stop.is_set():
                end_at_once(128 + number)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told, number)
        while not stop.is_set() and self.session.engine is not None and self.session.engine.alive:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), timeout=0.5)
        alive = self.session.engine is None or self.session.engine.alive
        return await self.stop() and alive

    async def stop(self) -> bool:
        """Sets health to NOT_SERVING and refuses new requests at once; those in flight have drain_seconds to end.
        Returns whether the engine has ended; one that hangs is left running."""
        await self._health.enter_graceful_shutdown()
        ended = True
        engine = self.session.engine
        if engine is not None:
            engine.drain()
            deadline = asyncio.get_running_loop().time() + self.config.drain_seconds
            while self._drains(engine) and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(POLL_SECONDS)
            ended = await asyncio.to_thread(engine.close, CLOSE_SECONDS)  # requests that are left are UNAVAILABLE
        if self._watching is not None:
            self._watching.cancel()
        self.session.close()
        await self._server.stop(CANCEL_GRACE_SECONDS)
        return ended

    def _drains(self, engine: Engine) -> bool:
        """Whether a request is in flight, or the answer to one still on its way to a client that reads slowly."""
        return engine.alive and (engine.in_flight > 0 or self.session.answering > 0)

    async def _set_health(self, status: int) -> None:
        for name in ("", *SERVICES):
            await self._health.set(name, status)
