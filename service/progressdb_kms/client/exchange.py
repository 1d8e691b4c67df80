"""One call, over all its tries: a generator of steps, which the async and the sync sender carry out."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from random import SystemRandom
from typing import Any, TypeVar

from progressdb_kms.client.protocol import Call, Encoding, Reply, Request, encode, read
from progressdb_kms.client.retry import Failure, RetryPolicy, pause_before_retry
from progressdb_kms.domain.errors import DeadlineExceeded, KmsError

T = TypeVar("T")
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Attempt:
    """Step: send the request and return the ``Reply``, within ``timeout`` seconds."""

    request: Request
    timeout: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Step: wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller may say of one call.

    Attributes:
        deadline: Seconds over all tries; None is the provider's own.
        headers: Headers to send along.
    """

    deadline: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for all calls of a provider.

    Attributes:
        deadline: Seconds over all tries of a call.
        retry: When to try again.
        encoding: Of bodies.
        now: A clock that never goes back, in seconds.
        random: Gives numbers from 0 to 1.
    """

    deadline: float = 5.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    encoding: Encoding = "json"
    now: Callable[[], float] = time.monotonic
    random: Callable[[], float] = SystemRandom().random


def exchange(call: Call[T], options: Options, rules: Rules) -> Generator[Attempt | Pause, Any, T]:
    """Try ``call`` until it succeeds, fails for good, or its time is over.

    Yields steps; each ``Attempt`` is sent its ``Reply`` or thrown the ``KmsError`` that it ended in.

    Raises:
        DeadlineExceeded: The time was over while waiting for an answer.
        KmsError: The last try's error.
    """
    # Encoded once: every try carries the same Idempotency-Key and X-Request-Id.
    request = encode(call, rules.encoding, options.headers)
    return retrying(lambda remaining: attempt(call, request, remaining), options, rules)


def retrying(
    once: Callable[[float], Generator[E, Any, T | Failure]], options: Options, rules: Rules
) -> Generator[E | Pause, Any, T]:
    """Try until it succeeds, fails for good, or the time is over; see ``exchange``.

    Args:
        once: Gives the steps of one try, which has so many seconds.
        options: Of the call.
        rules: Of the provider.
    """
    deadline = rules.deadline if options.deadline is None else options.deadline
    expires = rules.now() + deadline
    tries = 0
    while True:
        remaining = expires - rules.now()
        if remaining <= 0:
            raise DeadlineExceeded(f"no answer within {deadline:g} s ({tries} tries)")
        tries += 1
        failure = yield from once(remaining)
        if not isinstance(failure, Failure):
            return failure
        pause = pause_before_retry(rules.retry, failure, tries, expires - rules.now(), rules.random)
        if pause is None:
            raise failure.error
        yield Pause(pause)


def attempt(call: Call[T], request: Request, timeout: float) -> Generator[Attempt, Reply, T | Failure]:
    """Try once; return the answer, or why there is none."""
    try:
        reply = yield Attempt(request, timeout)
    except KmsError as error:
        return Failure(error)
    return read(call, reply)


def drive(steps: Generator[E, Any, T], perform: Callable[[E], Any]) -> T:
    """Carry out a generator's steps and return its result."""
    try:
        step = next(steps)
        while True:
            try:
                result = perform(step)
            except KmsError as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as done:
        value: T = done.value
        return value


async def adrive(steps: Generator[E, Any, T], perform: Callable[[E], Awaitable[Any]]) -> T:
    """Carry out a generator's steps, each awaited, and return its result."""
    try:
        step = next(steps)
        while True:
            try:
                result = await perform(step)
            except KmsError as error:
                step = steps.throw(error)
            else:
                step = steps.send(result)
    except StopIteration as done:
        value: T = done.value
        return value
