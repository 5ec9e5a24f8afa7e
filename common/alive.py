"""
Ranks that watch each other, so that a job with a dead rank ends within a minute, with one line that names the rank.

Without this the others wait in a collective call until its timeout, and say only that a connection broke. A thread of
each rank holds a connection to rank 0 (rank 0: to all). The system closes it in the moment the process dies; a machine
or process that just stops is noticed by its silence; a rank that hangs by the number of collective calls it has begun,
which goes along with every sign of life.
"""
import atexit
import os
import selectors
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field

BEAT = 2.0              # s between signs of life
SILENCE = 45.0          # s without one
GRACE = 5.0             # s from a rank's death to ours: torchrun may end us first, and then reports the rank, too
MESSAGE = struct.Struct("<cQ")      # what it says, see ENDS; collective calls begun
HELLO = struct.Struct("<I60s")      # rank, host
HOST = socket.gethostname()
ENDS = {b"": "was killed (out of memory?) or has crashed", b"!": "stops with an error, see its message",
        b"~": "ends because of another rank, see its message"}      # b"+" works, b"." has finished


@dataclass
class Peer:
    rank: int
    host: str
    link: socket.socket
    said: bytes = b"+"
    calls: int = 0                  # collective calls it has begun
    heard: float = field(default_factory=time.monotonic)        # when it last said something
    level: float = field(default_factory=time.monotonic)        # when it was last not behind, or went on


@dataclass
class State:
    calls: int = 0                                              # collective calls that this rank has begun
    last_word: bytes = b"!"                                     # for a process that ends without stop()
    peers: list[Peer] = field(default_factory=list)
    lost: threading.Event = field(default_factory=threading.Event)


STATE = State()


def start(rank: int, world_size: int, share_port, stuck: float) -> None:
    """
    Begin to watch. share_port: port of rank 0 (others pass 0) -> the same on all ranks. stuck: seconds that a rank may
    be behind at a collective call that others have begun.
    """
    if rank == 0:
        both = socket.has_dualstack_ipv6()
        with socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both,
                                  backlog=world_size) as server:
            share_port(server.getsockname()[1])
            server.settimeout(60)
            links = [server.accept()[0] for _ in range(world_size - 1)]
        hellos = [HELLO.unpack(link.recv(HELLO.size, socket.MSG_WAITALL)) for link in links]
        STATE.peers = [Peer(number, host.decode().rstrip("\0"), link) for (number, host), link in zip(hellos, links)]
    else:
        link = socket.create_connection((os.environ["MASTER_ADDR"], share_port(0)), timeout=60)
        link.sendall(HELLO.pack(rank, HOST.encode()[:60]))
        STATE.peers = [Peer(0, os.environ["MASTER_ADDR"], link)]
    for peer in STATE.peers:
        peer.link.settimeout(None)
    threading.Thread(target=watch, args=(stuck,), daemon=True).start()
    atexit.register(lambda: tell(STATE.last_word))
    sys.excepthook = lambda kind, error, trace: explain(rank, kind, error, trace)


def stop() -> None:
    """All ranks are done: nobody is missed from here on."""
    STATE.last_word = b"."
    tell(STATE.last_word)


def explain(rank: int, kind: type, error: BaseException, trace) -> None:
    """The traceback, and below it one line that names this rank, unless it only failed because another one is gone."""
    sys.__excepthook__(kind, error, trace)
    follows = isinstance(error, RuntimeError) and STATE.lost.wait(1.0)      # torch's, as a connection broke
    if not follows and isinstance(error, Exception):                        # not a Ctrl-C
        print(f"error: rank {rank} on {HOST}: {kind.__name__}: {error}", file=sys.stderr)


def tell(word: bytes) -> None:
    for peer in STATE.peers:
        try:
            peer.link.sendall(MESSAGE.pack(word, STATE.calls))
        except OSError:
            continue                                            # it is gone, which `listen` finds out


def listen(peer: Peer) -> None:
    """Take in what a peer has sent; its last message counts."""
    try:
        data = peer.link.recv(MESSAGE.size, socket.MSG_WAITALL)
    except OSError:
        data = b""
    peer.heard, known = time.monotonic(), peer.calls
    peer.said, peer.calls = MESSAGE.unpack(data) if len(data) == MESSAGE.size else (b"", known)
    if peer.calls > known:
        peer.level = peer.heard


def trouble(peer: Peer, stuck: float) -> str:
    """What is wrong with a peer, in words, or nothing."""
    now = time.monotonic()
    if peer.calls >= max(STATE.calls, *(other.calls for other in STATE.peers)):
        peer.level = now
    if peer.said in ENDS:
        return ENDS[peer.said]
    if peer.said == b"+" and now - peer.heard > SILENCE:
        return f"has given no sign of life for {SILENCE:.0f} s: it is frozen, or its machine or network is down"
    if peer.said == b"+" and now - peer.level > stuck:
        return f"hangs: for {stuck:.0f} s it has not come to a call that other ranks wait in"
    return ""


def watch(stuck: float) -> None:
    """The thread: listens, gives signs of life, and ends this process if another one has failed."""
    selector, told = selectors.DefaultSelector(), 0.0
    for peer in STATE.peers:
        selector.register(peer.link, selectors.EVENT_READ, peer)
    while selector.get_map():
        for key, _ in selector.select(BEAT):
            listen(key.data)
            if key.data.said != b"+":
                selector.unregister(key.fileobj)
        if time.monotonic() - told >= BEAT:
            tell(b"+")
            told = time.monotonic()
        for peer in STATE.peers:
            if problem := trouble(peer, stuck):
                end(peer, problem)


def end(peer: Peer, problem: str) -> None:
    """Say which rank has failed, at once unless it says so itself, and end this process with status 1."""
    time.sleep(GRACE if peer.said in (b"!", b"~") else 0)
    STATE.lost.set()
    line = f"error: rank {peer.rank} on {peer.host} {problem}; the job ends, and the same command resumes it"
    print(line, file=sys.stderr, flush=True)
    tell(b"~")
    time.sleep(GRACE)
    os._exit(1)
