"""Completions for whoever only waits for the end of a request, made on one thread for all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from isthmus.model.text.tokenizer import Tokenizer
from isthmus.serve.engine.messages import Event, Request
from isthmus.serve.prepare.answer import Answer, TextOptions
from isthmus.serve.prepare.delivery import Receiver
from isthmus.types import Completion

Events = SimpleQueue[Event | None]


class Whole(Receiver):
    """The receiver of a request whose completion a Reader makes."""

    def __init__(self, events: Events, *, streams: bool) -> None:
        """events: the reader's. streams: whether its text is read as it comes, because that may end it."""
        self.streams = streams
        self.completion: Future[Completion] = Future()
        """It can't be cancelled: cancel the request, and this has the error that says so"""
        self.completion.set_running_or_notify_cancel()
        self._events = events

    def put_nowait(self, event: Event, /) -> None:
        self._events.put(event)


class Reader:
    """A thread that reads the answers of an engine. A request with stop strings is read as its tokens come, and
    cancelled when one is found; others are read when they have ended."""

    def __init__(self, tokenizer: Tokenizer, cancel: Callable[[Request], object]) -> None:
        """cancel: ends a request; it may have ended already."""
        self._tokenizer, self._cancel = tokenizer, cancel
        self._events: Events = SimpleQueue()
        self._answers: dict[Request, Answer] = {}
        """Of the requests that have begun and not ended"""
        self._thread = threading.Thread(target=self._main, name="reader", daemon=True)
        self._thread.start()

    def receiver(self, options: TextOptions) -> Whole:
        """The receiver for a request with these `text_options`."""
        return Whole(self._events, streams=options.stops is not None)

    def close(self) -> None:
        """Ends the thread once it has read all that came before."""
        self._events.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _main(self) -> None:
        while (event := self._events.get()) is not None:
            whole: Whole = event.request.reply_to
            if not whole.completion.done():  # a stop string may have ended it before
                self._take(event, whole)

    def _take(self, event: Event, whole: Whole) -> None:
        request = event.request
        answer = self._answers.pop(request, None) or Answer(self._tokenizer, request)
        try:
            completion = answer.take([event]).completion if whole.streams else _of_end(answer, event)
        except BaseException as error:  # tokenizers' panics are no Exceptions; whoever waits gets it
            self._cancel(request)
            whole.completion.set_exception(error)
            return
        if completion is None:
            self._answers[request] = answer
        else:
            self._cancel(request)
            whole.completion.set_result(completion)


def _of_end(answer: Answer, last: Event) -> Completion:
    assert last.end is not None
    return answer.whole(last.end)
