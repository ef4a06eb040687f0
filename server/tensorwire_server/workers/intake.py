"""Requests on their way in: check, tokenize, validate, ACK, hand over."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tensorwire_protocol.errors import Draining, ModelError, ModelLoading
from tensorwire_protocol.messages import Ack, Failure, Finish
from tensorwire_protocol.operations import OPERATIONS, check_inputs, read_texts

from tensorwire_server.workers.arrays import ArrayItem
from tensorwire_server.workers.faults import as_internal_error
from tensorwire_server.workers.logprobs import LogprobBook
from tensorwire_server.workers.registry import log
from tensorwire_server.workers.requests import (
    TextInput,
    build_order,
    check_operation,
    read_input,
    read_prompt,
)
from tensorwire_server.workers.streams import ArrayStream, TextStream
from tensorwire_server.workers.text import StopMatcher
from tensorwire_server.workers.waiting import WaitingTexts

if TYPE_CHECKING:
    from collections.abc import Callable

    from tensorwire_protocol.messages import Submit

    from tensorwire_server.workers.compute import Compute
    from tensorwire_server.workers.link import Link
    from tensorwire_server.workers.registry import Registry

T = TypeVar("T")

# Tokenizing this much takes as long as a trip to another thread and back (measured: 70 us).
INLINE_CHARS = 256
RENDERING_THREADS = 4
# More ids than this do not fit into the meta of an ACK; the journal does without them.
_MAX_ACK_IDS = 250_000


class Intake:
    """Turns each SUBMIT into a stream with commands for the compute side, or into an ERR."""

    def __init__(self, registry: Registry) -> None:
        self.load_failure: str | None = None
        self._registry = registry
        self._num_streams = 0  # so far
        self._waiting = WaitingTexts()
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        # A chat template may take its time: it must hold up neither a text nor another chat.
        self._rendering = ThreadPoolExecutor(RENDERING_THREADS, thread_name_prefix="render")

    def submit(self, link: Link, submit: Submit, now: float) -> None:
        """Take one request that arrived at `now` (monotonic s)."""
        registry = self._registry
        try:
            compute = self._check_admission(link, submit)
        except Exception as error:
            link.send(Failure.of(submit.stream, as_internal_error(error, registry.model, log)))
            return
        self._num_streams = id = self._num_streams + 1
        stream: TextStream | ArrayStream
        if submit.op in ("generate", "chat"):
            stream = TextStream(link, submit.stream, submit.attempt, id, now)
        else:
            stream = ArrayStream(link, submit.stream, submit.attempt, id, now)
        registry.add(stream, submit.deadline_ms)
        try:
            check_inputs(OPERATIONS[submit.op], submit.inputs)
            if isinstance(stream, TextStream):
                self._begin_text(stream, submit, compute)
            elif submit.op == "infer":
                self._join_items(stream, [submit.inputs], [1], compute)
            elif submit.op == "embed":
                self._begin_embed(stream, submit, compute)
            else:
                self._begin_tokenize(stream, submit, compute)
        except Exception as error:
            registry.fail(stream, error)

    def _check_admission(self, link: Link, submit: Submit) -> Compute:
        registry = self._registry
        if self.load_failure is not None:
            raise ModelError(f"{registry.model!r} could not be loaded: {self.load_failure}")
        if link.is_draining:
            raise Draining(f"this worker of {registry.model!r} is shutting down")
        if registry.compute is None:
            raise ModelLoading(f"{registry.model!r} is loading")
        check_operation(submit.op, registry.compute.engine.card, registry.model)
        registry.check_room()
        return registry.compute

    # -- text: generate and chat ----------------------------------------------------------------

    def _begin_text(self, stream: TextStream, submit: Submit, compute: Compute) -> None:
        tokenizer = compute.engine.tokenizer
        num_chars, read = read_input(submit, tokenizer)
        renders = submit.op == "chat" and not tokenizer.renders_at_once
        self._tokenize(
            stream,
            num_chars,
            read,
            lambda found: self._join_text(stream, submit, found, compute),
            thread=self._rendering if renders else None,
        )

    def _join_text(
        self, stream: TextStream, submit: Submit, found: TextInput, compute: Compute
    ) -> None:
        prompt_ids = found.prompt_ids
        order = build_order(
            submit,
            prompt_ids,
            card=compute.engine.card,
            model=self._registry.model,
            arrived_at=stream.arrived_at,
            bad_words=found.bad_words,
        )
        sampling = order.sampling
        stream.prompt_tokens = len(prompt_ids)
        stops = submit.params.get("stop")
        stream.begin(
            found.detokenizer,
            StopMatcher(stops) if stops else None,
            min_new_tokens=sampling.shaping.min_new_tokens if sampling.shaping else 0,
            lead=found.lead,
            logprobs=LogprobBook(sampling, prompt_ids) if sampling.reports else None,
        )
        is_stopped = stream.replay(order.so_far, found.texts_so_far)
        finish = Finish.STOP if is_stopped else order.finish
        shown_ids = prompt_ids if len(prompt_ids) <= _MAX_ACK_IDS else None
        stream.link.send(
            Ack(stream=stream.number, prompt_tokens=len(prompt_ids), prompt_ids=shown_ids)
        )
        if finish is None:
            self._registry.commands.append(order.sequence(stream.id))
        elif sampling.reports:
            stream.ends_with = finish
            self._registry.commands.append(order.scoring_sequence(stream.id))
        else:
            self._registry.finish(stream, stream.end(finish))

    # -- answered once: embed, infer, tokenize --------------------------------------------------

    def _begin_embed(self, stream: ArrayStream, submit: Submit, compute: Compute) -> None:
        texts = read_texts(submit.inputs["texts"])
        encode = compute.engine.tokenizer.encode

        def join(ids: list[list[int]]) -> None:
            costs = [len(one) for one in ids]
            stream.prompt_tokens = sum(costs)
            self._join_items(stream, ids, costs, compute)

        num_chars = sum(map(len, texts)) + len(texts)  # an empty text takes its time too
        self._tokenize(stream, num_chars, lambda: [encode(text) for text in texts], join)

    def _begin_tokenize(self, stream: ArrayStream, submit: Submit, compute: Compute) -> None:
        num_chars, encode = read_prompt(submit, compute.engine.tokenizer)

        def answer(ids: list[int]) -> None:
            stream.prompt_tokens = len(ids)
            outputs = {"ids": np.asarray(ids, dtype=np.int32)}
            self._registry.finish(stream, stream.result(outputs))

        self._tokenize(stream, num_chars, encode, answer)

    def _join_items(
        self, stream: ArrayStream, payloads: list[Any], costs: list[int], compute: Compute
    ) -> None:
        self._registry.add_items(stream, len(payloads))
        if not compute.is_inline:  # else the answer itself leaves in the same write
            stream.link.send(Ack(stream=stream.number, prompt_tokens=stream.prompt_tokens))
        commands, id = self._registry.commands, stream.id
        for index, payload in enumerate(payloads):
            commands.append(ArrayItem(id, index, payload, costs[index]))

    # -- the tokenizer's thread -----------------------------------------------------------------

    def _tokenize(
        self,
        stream: TextStream | ArrayStream,
        num_chars: int,
        encode: Callable[[], T],
        then: Callable[[T], None],
        *,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        """Call `then` with what `encode` gives: at once, or from the loop after a while.

        Args:
            thread: where it is done; None: here if it is little, else on the tokenizer's thread.

        Raises:
            Busy: too much waits already.
        """
        if thread is None and num_chars <= INLINE_CHARS:
            then(encode())
            return
        job = stream.job = self._waiting.add(num_chars, encode, then)

        def take(future: Future[T]) -> None:
            finish = job.finish()
            if finish is None:
                return  # the stream ended meanwhile
            try:
                finish(future.result())
            except Exception as error:
                self._registry.fail(stream, error)
            self._registry.flush()

        call_soon = self._registry.loop.call_soon_threadsafe
        (thread or self._tokenizing).submit(job.run).add_done_callback(
            lambda future: call_soon(take, future)
        )
