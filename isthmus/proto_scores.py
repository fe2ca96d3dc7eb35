"""Converts between the library's own types and the messages of isthmus.v1 for Score and Embed."""

from __future__ import annotations

from isthmus.arguments import check_flag, check_whole
from isthmus.errors import RequestFailed
from isthmus.forms import check_string
from isthmus.proto import PROMPT_ARGUMENTS, SERVICE_ARGUMENTS, logprobs_of, set_ids, set_prompt, set_service
from isthmus.scores import Embedding, EmbedQuestion, Score, ScoreQuestion, check_pooling
from isthmus.v1 import inference_pb2

SCORE_FIELDS = {**PROMPT_ARGUMENTS, **SERVICE_ARGUMENTS}
"""The library's arguments, and the fields of a ScoreRequest for them. All others have the same name"""
EMBED_FIELDS = {
    **{name: field.replace("prompt", "inputs[0]", 1) for name, field in PROMPT_ARGUMENTS.items()},
    **SERVICE_ARGUMENTS,
    "normalize": "keep_length",
}
"""The same for an EmbedRequest with one input"""


_POOLING = {"mean": inference_pb2.POOLING_MEAN, "last": inference_pb2.POOLING_LAST}


def score_message(question: ScoreQuestion) -> inference_pb2.ScoreRequest:
    """The message for a question. Raises InvalidRequest for a value that it can't hold."""
    message = inference_pb2.ScoreRequest(request_id=question.request_id)
    set_prompt(message.prompt, question.prompt, question.truncate_prompt_tokens)
    for index, continuation in enumerate(question.continuations):
        added = message.continuations.add()
        if isinstance(continuation, str):
            added.text = check_string(f"continuations[{index}]", continuation)
        else:
            added.token_ids.SetInParent()
            set_ids(f"continuations[{index}]", continuation, added.token_ids.ids)
    if question.logprobs is not None:
        message.logprobs = check_whole("logprobs", question.logprobs, 32)
    set_service(message, question.service)
    return message


def scores_of(message: inference_pb2.ScoreResponse) -> list[Score]:
    """The scores that a response holds."""
    return [
        Score(
            logprob=score.logprob,
            is_greedy=score.is_greedy,
            token_ids=tuple(score.token_ids),
            logprobs=logprobs_of(score.logprobs) if score.HasField("logprobs") else None,
            prompt_tokens=score.usage.prompt_tokens,
            cached_prompt_tokens=score.usage.cached_prompt_tokens,
        )
        for score in message.scores
    ]


def embed_message(question: EmbedQuestion) -> inference_pb2.EmbedRequest:
    """The message for a question. Raises InvalidRequest for a value that it can't hold."""
    message = inference_pb2.EmbedRequest(request_id=question.request_id)
    set_prompt(message.inputs.add(), question.prompt, question.truncate_prompt_tokens)
    message.pooling = _POOLING[check_pooling(question.pooling)]
    message.keep_length = not check_flag("normalize", question.normalize)
    if question.dimensions is not None:
        message.dimensions = check_whole("dimensions", question.dimensions, 32)
    set_service(message, question.service)
    return message


def embedding_of(message: inference_pb2.EmbedResponse) -> Embedding:
    """The vector that the response to a message with one input holds. Raises RequestFailed if it doesn't."""
    if len(message.embeddings) != 1:
        raise RequestFailed(f"the server answered with {len(message.embeddings)} embeddings")
    (embedding,) = message.embeddings
    return Embedding(
        values=tuple(embedding.values),
        prompt_tokens=embedding.usage.prompt_tokens,
        cached_prompt_tokens=embedding.usage.cached_prompt_tokens,
    )
