"""How soon connections of a revoked client are cut, and what a roll of the client CA costs the others.

Runs a service on a Redis of its own, as the tests do, under 500 encrypts a second of clients that stay
allowed. Each time a new list is put in its place, the open connections of a client that it revokes are
watched. Three spans: from the list to the first cut (the service looks each second, and acts when two looks
agree), from the first cut to the line that says that the new set is in use (both by the service's log), and
from the first cut to the moment at which the client had seen the last of its connections end. Then the client
CA is rolled: the old one, both, the new one.

    python -m benchmarks.revocation
"""

from __future__ import annotations

import argparse
import datetime as dt
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Sequence

from tests.contract.wire_client import tls_connect, tls_context
from tests.integration.rolling import RATE, Traffic, gets_in
from tests.integration.world import LIMIT, Instance, World, eventually, issued_for, write_private
from tests.transport.pki import Ca, Issued


def when(record: dict[str, str]) -> float:
    """Return the time of a line of the log."""
    return dt.datetime.fromisoformat(record["timestamp"]).timestamp()


def all_ended(sockets: Sequence[socket.socket]) -> float:
    """Return when the last connection had ended."""
    with selectors.DefaultSelector() as selector:
        for sock in sockets:
            selector.register(sock, selectors.EVENT_READ)
        end = time.monotonic() + LIMIT
        while selector.get_map():
            for key, _ in selector.select(1.0):
                selector.unregister(key.fileobj)
            if time.monotonic() > end:
                raise TimeoutError("they are not cut")
        return time.time()


def revoke(service: Instance, count: int, revoked: list[Issued], number: int) -> tuple[float, float, float]:
    """Revoke a client that has so many connections open; return the three spans in seconds."""
    world = service.world
    name = f"gone-{number}"
    cert, key = world.certificate(name)
    connect = tls_connect("localhost", service.port, tls_context(world.ca_file, cert, key))
    sockets = [connect() for _ in range(count)]
    before = service.metric("kms_connections_closed_total", why="revoked")
    revoked.append(issued_for(name, world.ca))
    try:
        text = world.ca.crl(*revoked)
        # Anywhere between two looks of the service.
        time.sleep(number % 10 / 10)
        put = time.time()
        write_private(world.root / "crl.pem", text)
        seen = all_ended(sockets)
    finally:
        for sock in sockets:
            sock.close()
    service.until("kms_connections_closed_total", lambda closed: closed >= before + count, why="revoked")
    closed = [
        when(record)
        for record in service.records()
        if record["event"].endswith("closed: revoked") and f"dns:{name})" in record["event"]
    ]
    reloaded = next(at for at in map(when, service.logged("reloaded")) if at >= max(closed))
    return min(closed) - put, reloaded - min(closed), seen - min(closed)


def roll(service: Instance, traffic: Traffic, use: Callable[[Ca], None]) -> float:
    """Roll the client CA to a new one; return how long it took, in seconds."""
    world = service.world
    old, new = world.ca, Ca("the next CA")
    began = time.monotonic()
    write_private(world.root / "crl.pem", old.crl() + new.crl())
    write_private(world.client_ca_file, new.pem + old.pem)
    eventually(lambda: gets_in(service, new), "both are trusted")
    use(new)
    traffic.renew()
    write_private(world.root / "crl.pem", new.crl())
    write_private(world.client_ca_file, new.pem)
    eventually(lambda: not gets_in(service, old), "the new one alone is trusted")
    return time.monotonic() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--revocations", type=int, default=20)
    parser.add_argument("--connections", type=int, default=100, help="of the revoked client")
    parser.add_argument("--settle", type=float, default=10.0, help="seconds of traffic after the roll")
    options = parser.parse_args()
    world = World()
    try:
        world.store.start()
        write_private(world.root / "crl.pem", world.ca.crl())
        tls = {**world.tls, "client_crl": str(world.root / "crl.pem")}
        service = world.instance("a", tls=tls).start()
        key_id = service.client("server").create("t:1")["key_id"]
        issuer = world.ca

        def use(ca: Ca) -> None:
            nonlocal issuer
            issuer = ca

        traffic = Traffic(lambda: service.client("server", issuer), key_id)
        try:
            revoked: list[Issued] = []
            spans = [
                revoke(service, options.connections, revoked, number) for number in range(options.revocations)
            ]
            print(f"{options.revocations} revocations, {options.connections} open connections each")
            names = ("list in place to first cut", "first cut to reloaded", "first cut to all seen ended")
            for name, values in zip(names, zip(*spans, strict=True), strict=True):
                print(f"  {name}: median {statistics.median(values):.3f} s, at most {max(values):.3f} s")
            print(f"  the others: {traffic.answered} requests, {len(traffic.failed)} failed")
            before, began = traffic.answered, time.monotonic()
            seconds = roll(service, traffic, use)
            time.sleep(options.settle)
        finally:
            traffic.stop()
        count, rate = traffic.answered - before, (traffic.answered - before) / (time.monotonic() - began)
        print(f"roll of the CA in {seconds:.1f} s: {count} requests, {rate:.0f}/s of {RATE}/s asked for")
        print(f"  failed in all: {len(traffic.failed)}")
    finally:
        world.close()


if __name__ == "__main__":
    main()
