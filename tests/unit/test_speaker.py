"""What the admin port says for all workers."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from progressdb_kms.bootstrap.speaker import Speaker, lay_down
from progressdb_kms.observability.metrics import Metrics
from progressdb_kms.transport.board import Board, Place, Stage


class Worker:
    """A worker, as far as it speaks."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.reasons: list[str] = []
        self.metrics = Metrics()
        self.speaker = Speaker(place, self.metrics, lambda: self.reasons)
        place.begin(100 + place.number)

    def serve(self) -> None:
        """Begin to serve."""
        self.place.enter(Stage.SERVING)
        self.speaker.say()


def crew(count: int) -> tuple[Board, list[Worker]]:
    """Return workers that start."""
    board = Board(count)
    return board, [Worker(place) for place in board.places]


def invalid(worker: Worker) -> float:
    """Return a counter as a scrape of this worker finds it."""
    text = worker.speaker.metrics().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "kms_wrapped_key_invalid_total"
    )


def test_one_that_serves_is_enough() -> None:
    """Those that start are not asked as long as one serves; before that, each reason is given once."""
    _, (one, two) = crew(2)
    one.reasons = two.reasons = ["the store does not answer"]
    for worker in (one, two):
        worker.speaker.say()
    assert one.speaker.unready() == ["no worker serves yet", "the store does not answer"]
    two.reasons = []
    two.serve()
    assert one.speaker.unready() == two.speaker.unready() == []
    two.reasons = ["tls: the server certificate has expired"]
    two.speaker.say()
    assert one.speaker.unready() == two.reasons


def test_who_ends_alone_does_not_speak_for_the_service() -> None:
    """One that drains by itself is no reason; all of them at once are."""
    board, (one, two) = crew(2)
    one.serve()
    two.serve()
    one.reasons = ["draining"]
    one.place.enter(Stage.LEAVING)
    assert one.speaker.unready() == two.speaker.unready() == []
    board.drain()
    assert two.speaker.unready() == ["draining"]


def test_what_an_ended_worker_has_counted_stays() -> None:
    """The sum is the same after one has ended, and after the next in its place."""
    _, (one, two) = crew(2)
    for worker in (one, two):
        worker.serve()
        worker.metrics.wrapped_key_invalid()
        worker.speaker.say()
    assert invalid(two) == 2
    lay_down(one.place)
    assert invalid(two) == 2
    again = Worker(one.place)
    again.metrics.wrapped_key_invalid()
    again.serve()
    assert invalid(two) == invalid(again) == 3
    lay_down(again.place)
    assert invalid(two) == 3


def test_rubbish_of_an_ended_worker_costs_its_counts_alone() -> None:
    """What a worker left that went astray ends nobody else."""
    _, (one, two) = crew(2)
    for worker in (one, two):
        worker.metrics.wrapped_key_invalid()
        worker.serve()
    for rubbish in (b"\xc1", b"\x92\x90\x91\x01"):
        one.place.say(rubbish)
        lay_down(one.place)
        assert one.place.stage is Stage.DOWN
        assert invalid(two) == 1
