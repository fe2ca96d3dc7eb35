"""Bytes that nobody means well with: for methods, for connections, and around them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from isthmus import generate_request
from isthmus.v1 import control_pb2
from isthmus.v1 import inference_pb2 as pb

INFERENCE, CONTROL, HEALTH = "/isthmus.v1.InferenceService/", "/isthmus.v1.ControlService/", "/grpc.health.v1.Health/"
GENERATE, STREAM = INFERENCE + "Generate", INFERENCE + "GenerateStream"
WATCH, CHECK = HEALTH + "Watch", HEALTH + "Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS = [
    *(GENERATE, STREAM, *(INFERENCE + name for name in ("Score", "Embed", "Tokenize", "Detokenize"))),
    *(CONTROL + name for name in ("GetModelInfo", "GetServerInfo", "GetLoad", "Cancel")),
    *(CHECK, WATCH, REFLECTION),
]
NOWHERE = [INFERENCE + "Steal", "/isthmus.v2.InferenceService/Generate", "/", "//", "/a" * 200]

MARK = b"placeholder"
"""Where a text goes that is no UTF-8"""
TEXTS = [
    *("", "a", "\0", "\ufeff", "\U0010ffff" * 40, "e\u0301" * 300, "\u202eabc", "%s%n{}{{ x }}", "../../etc/passwd"),
    *("<|endoftext|>" * 30, "a" * 20_000, "😀" * 3000, "\n" * 5000, " " * 5000, "ab 12\t" * 2000, MARK.decode()),
]
WHOLE = [0, 1, 2, 127, 128, 255, 511, 512, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
REAL = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, 3.4e38, -1.0, 1.0, 0.5]
ARGUMENTS = [
    *("", "{", "[]", "null", "NaN", '{"a": 1e999}', '{"a": NaN}', '{"a": 1, "a": 2}', '{"style": {}}', '"\\ud800"'),
    *("[" * 50_000, '{"a":' * 5000, "9" * 10_000, '{"style": "\\ud800"}', '{"messages": 0}', '{"style": "terse"}'),
]


def _sampling(rng: random.Random) -> pb.SamplingParams:
    params = pb.SamplingParams()
    for name, values in (("temperature", REAL), ("top_p", REAL), ("min_p", REAL), ("top_k", WHOLE)):
        if rng.random() < 0.1:
            setattr(params, name, rng.choice(values))
    if rng.random() < 0.5:
        params.seed = rng.choice([0, (1 << 64) - 1, rng.getrandbits(64)])
    return params


def _harmless(rng: random.Random) -> pb.GenerateRequest:
    prompt = rng.choices(range(1, 200), k=rng.randrange(1, 90))
    return generate_request(prompt, max_tokens=rng.randrange(1, 40), request_id=rng.choice(["", "a", "b", "c"]))


def _prompt(rng: random.Random) -> pb.Prompt:
    prompt = pb.Prompt(parse_special=rng.random() < 0.3)
    kind = rng.choice(["text", "ids", "ids", "messages", "nothing"])
    if kind == "text":
        prompt.text = rng.choice(TEXTS)
    if kind == "ids":
        prompt.token_ids.ids.extend(_ids(rng))
    if kind == "messages":
        for _ in range(rng.choice([0, 1, 3, 1025])):
            role, content = rng.choice(["user", "critic", "", "\0"]), rng.choice(TEXTS[:12])
            prompt.messages.messages.add(role=role, content=content)
        prompt.messages.template_arguments_json = rng.choice(ARGUMENTS)
    return prompt


def _ids(rng: random.Random) -> list[int]:
    return rng.choices(WHOLE[:6] if rng.random() < 0.8 else WHOLE, k=rng.randrange(300))


def _score(rng: random.Random) -> pb.ScoreRequest:
    request = pb.ScoreRequest(prompt=_prompt(rng), request_id=rng.choice(["", "a", "b", "c"]))
    for _ in range(rng.choice([0, 1, 1, 3, 129])):
        text = rng.random() < 0.5
        request.continuations.append(
            pb.Continuation(text=rng.choice(TEXTS[:9]))
            if text
            else pb.Continuation(token_ids=pb.TokenIds(ids=_ids(rng)[:20]))
        )
    if rng.random() < 0.5:
        request.logprobs = rng.choice([0, 1, 20, rng.choice(WHOLE)])
    return request


def _embed(rng: random.Random) -> pb.EmbedRequest:
    request = pb.EmbedRequest(inputs=[_prompt(rng) for _ in range(rng.choice([0, 1, 1, 3]))])
    request.keep_length = rng.random() < 0.5
    if rng.random() < 0.3:
        request.dimensions = rng.choice(WHOLE)
    return request


def _generate(rng: random.Random) -> pb.GenerateRequest:
    request = pb.GenerateRequest(prompt=_prompt(rng), sampling=_sampling(rng))
    request.request_id = rng.choice(TEXTS) if rng.random() < 0.1 else rng.choice(["", "a", "b", "c"])
    if rng.random() < 0.8:
        request.stop.max_tokens = rng.choice([0, 1, 5, 30, rng.choice(WHOLE)])
    if rng.random() < 0.3:
        request.stop.token_ids.extend(rng.choices(WHOLE[: rng.choice([6, 11])], k=rng.choice([0, 1, 64, 65])))
    request.stop.ignore_eos = rng.random() < 0.5
    if rng.random() < 0.5:
        request.output.text, request.output.token_ids = rng.random() < 0.5, rng.random() < 0.5
    return request


def message(rng: random.Random, method: str) -> Message:
    """One that `method` takes: well formed, and of values that it may not like."""
    match method.rsplit("/")[-1]:
        case "Generate":
            return rng.choice([_harmless, _generate])(rng)
        case "GenerateStream":
            return pb.GenerateStreamRequest(request=rng.choice([_harmless, _generate, lambda _: None])(rng))
        case "Score":
            return _score(rng)
        case "Embed":
            return _embed(rng)
        case "Tokenize":
            return pb.TokenizeRequest(text=rng.choice(TEXTS), parse_special=rng.random() < 0.5)
        case "Detokenize":
            return pb.DetokenizeRequest(token_ids=rng.choices(WHOLE[: rng.choice([7, 11])], k=rng.randrange(2000)))
        case "Cancel":
            ids = rng.choices(["a", "b", *TEXTS[:9]], k=rng.choice([0, 1, 9, 1024, 1025]))
            return control_pb2.CancelRequest(request_ids=ids)
        case "Check" | "Watch":
            return health_pb2.HealthCheckRequest(service=rng.choice(["", "isthmus.v1.InferenceService", *TEXTS]))
        case _:
            return control_pb2.GetLoadRequest()


def _random(rng: random.Random, data: bytes) -> bytes:
    return rng.randbytes(rng.choice([1, 2, 5, 30, 300, 20_000]))


def _truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flipped(rng: random.Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8]) if data else 0):
        flipped[rng.randrange(min(len(data), rng.choice([8, 64, 1 << 30])))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _no_utf8(rng: random.Random, data: bytes) -> bytes:
    bad = rng.choice([b"\xff" * 11, b"\xed\xa0\x80" * 3 + b"ab", b"\xc0\x80" * 5 + b"a", b"abcdefghi\xf0\x9f"])
    return data.replace(MARK, bad)


def _mistyped(rng: random.Random, data: bytes) -> bytes:
    """Fields of the message's numbers, of any wire type; also groups that never end and lengths past the end."""
    made = bytearray(data if rng.random() < 0.5 else b"")
    for _ in range(rng.randrange(1, 6)):
        made += _varint(rng.randrange(1, 10) << 3 | rng.randrange(8))
        made += rng.choice([_varint(rng.choice([0, 3, 1 << 63])), rng.randbytes(8), b"\x03abc", b"\xff" * 11])
    return bytes(made)


def _nested(rng: random.Random, data: bytes) -> bytes:
    """Messages or groups in one another, deeper than a parser may follow."""
    if rng.random() < 0.5:
        return b"\x0b" * rng.choice([99, 101, 5000])
    for _ in range(rng.choice([20, 120, 500])):
        data = b"\x0a" + _varint(len(data)) + data
    return data


def _repeated(rng: random.Random, data: bytes) -> bytes:
    return data * rng.choice([2, 3, 50]) if len(data) < 1000 else data + b"\x08\x01"


def _long(rng: random.Random, data: bytes) -> bytes:
    """Just below what a text may have."""
    size = rng.choice([1 << 16, 1 << 20, (4 << 20) - 64]) if rng.random() < 0.1 else 1 << 14
    field = rng.choice([b"\x0a", b"\x12", b"\x22"])
    return field + _varint(size) + rng.choice([b"a", b" ", b"\xff", b"\x01"]) * size


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


def _as_it_is(rng: random.Random, data: bytes) -> bytes:
    return data


Spoil = Callable[[random.Random, bytes], bytes]
SPOILS: list[Spoil] = [
    *(_random, _truncated, _flipped, _flipped, _no_utf8, _mistyped, _nested, _repeated, _long),
    *[_as_it_is] * 4,
]


def payload(rng: random.Random, method: str) -> bytes:
    """Bytes for `method`, malformed or well formed and hostile."""
    return rng.choice(SPOILS)(rng, message(rng, method).SerializeToString())


# Connections

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"


def _frame(kind: int, flags: int, stream: int, body: bytes, length: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(body) if length is None else length)[1:] + struct.pack(">BBI", kind, flags, stream) + body
    )


def _headers(path: str, more: dict[str, str] | None = None) -> bytes:
    """HPACK, each as a literal that isn't indexed."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "a",
        "content-type": "application/grpc",
        "te": "trailers",
        **(more or {}),
    }
    words = (word.encode() for field in fields.items() for word in field)
    names = (bytes([len(word)]) + word for word in words)
    return b"".join(b"\0" + name + next(names) for name in names)


def connection(rng: random.Random) -> bytes:
    """What a connection sends that isn't gRPC, is half of it, or is wrong within."""
    begun = PREFACE + SETTINGS
    call = begun + _frame(1, 4, 1, _headers(rng.choice(METHODS)))
    data = payload(rng, GENERATE)[:5000]
    calls = range(1, 99, 2)
    wrong = _headers(GENERATE, {":status": "no number", "te": "nothing", "grpc-timeout": "for ever"})
    goodbye = _frame(7, 0, 0, struct.pack(">II", 0, rng.getrandbits(32)) + rng.randbytes(16_000))
    hasty = (_frame(1, 4, call, _headers(GENERATE)) + _frame(3, 0, call, b"\0\0\0\x08") for call in calls)
    return rng.choice(
        [
            rng.randbytes(rng.choice([1, 9, 24, 400])),
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),  # a TLS handshake
            PREFACE[: rng.randrange(len(PREFACE))],
            begun[: rng.randrange(len(PREFACE), len(begun) + 1)],
            begun + _frame(rng.randrange(12), rng.randrange(256), rng.choice([0, 1, 2, 1 << 31]), rng.randbytes(30)),
            begun + _frame(4, 0, 0, rng.randbytes(18)),
            begun + _frame(1, 4, 1, rng.randbytes(80)),
            begun + b"".join(_frame(1, 5, call, wrong) for call in calls),
            begun + goodbye * 20,
            begun + _frame(0, 0, 1, b"", length=(1 << 24) - 1),
            begun + b"".join(hasty),  # calls that are cancelled at once
            call,  # and never its message
            call + _frame(0, 1, 1, struct.pack(">BI", rng.randrange(3), rng.choice([len(data), 1 << 31])) + data),
            call + _frame(0, 0, 1, b"\0\0\0"),
            call + _frame(9, 4, 1, b"\0" * 40),
        ]
    )
