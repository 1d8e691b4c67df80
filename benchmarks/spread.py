"""How connections are spread over two processes that listen on one address, by three ways of sharing it.

`shared`: both accept from one socket. `held back`: likewise, and who has more connections lets the other go
first (what the service does). `reuseport`: a socket each with SO_REUSEPORT, the kernel chooses by a hash. 16
connections come one after the other or all at once, and stay; each takes 1 ms of CPU time, as a TLS handshake
does. Printed is how many the less loaded process has of 16, and in how many rounds it has fewer than 6.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import sys
import time

import uvloop

from progressdb_kms.transport.board import Board, Place, Stage
from progressdb_kms.transport.listeners import Acceptor

CONNECTIONS = 16
FEW = 6
HANDSHAKE = 0.001
ADDRESS = "127.0.0.1"


def main() -> None:
    """Measure all ways, in turns."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    found: dict[tuple[str, bool], list[int]] = {}
    for _ in range(rounds):
        for way in ("shared", "held back", "reuseport"):
            for at_once in (False, True):
                found.setdefault((way, at_once), []).append(one_round(way, at_once=at_once))
    print(
        f"load {os.getloadavg()}, {rounds} rounds\n"
        f"\n| way | connections come | mean | least | fewer than {FEW} |"
    )
    print("|---|---|---|---|---|")
    for (way, at_once), counts in found.items():
        few = sum(count < FEW for count in counts)
        how = "at once" if at_once else "one by one"
        print(f"| {way} | {how} | {statistics.mean(counts):.1f} | {min(counts)} | {few} of {rounds} |")


def one_round(way: str, *, at_once: bool) -> int:
    """Return how many of the connections the less loaded of two processes got."""
    board = Board(2)
    first = listening(0, reuseport=way == "reuseport")
    port = first.getsockname()[1]
    sockets = [first, listening(port, reuseport=True) if way == "reuseport" else first]
    pids = [start(place, sock, way) for place, sock in zip(board.places, sockets, strict=True)]
    for sock in set(sockets):
        sock.close()
    while any(place.stage is not Stage.SERVING for place in board.places):
        time.sleep(0.001)
    clients = []
    for _ in range(CONNECTIONS):
        clients.append(socket.create_connection((ADDRESS, port)))
        if not at_once:
            clients[-1].recv(1)
    if at_once:
        for client in clients:
            client.recv(1)
    counts = [place.accepted for place in board.places]
    for client in clients:
        client.close()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return min(counts)


def listening(port: int, *, reuseport: bool) -> socket.socket:
    """Return a listening socket."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuseport:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((ADDRESS, port))
    sock.listen(CONNECTIONS)
    sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
    return sock


def start(place: Place, sock: socket.socket, way: str) -> int:
    """Fork a process that accepts, and return its id."""
    pid = os.fork()
    if pid == 0:
        uvloop.run(accept(place, sock, way))
    return pid


async def accept(place: Place, sock: socket.socket, way: str) -> None:
    """Accept connections and keep them."""
    kept = []

    def accepted(client: socket.socket) -> None:
        place.accepted += 1
        kept.append(client)
        asyncio.get_running_loop().call_soon(shake_hands, client)

    place.begin(os.getpid())
    if way == "held back":
        Acceptor(sock, accepted, place.hold_back)
    else:
        Acceptor(sock, accepted)
    place.enter(Stage.SERVING)
    while True:
        place.alive()
        await asyncio.sleep(0.5)


def shake_hands(client: socket.socket) -> None:
    """Spend what a handshake costs, and answer."""
    end = time.thread_time() + HANDSHAKE
    while time.thread_time() < end:
        pass
    client.send(b"x")


if __name__ == "__main__":
    main()
