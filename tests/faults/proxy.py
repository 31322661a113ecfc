"""A TCP proxy that does to connections what networks do."""

from __future__ import annotations

import random
import socket
import threading
import time
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What happens to one connection: `kind` after `after` bytes of the answer."""

    kind: str
    after: int


@dataclass
class Proxy:
    """Forwards to a port, with a fault per connection until none is left.

    Attributes:
        done: the faults that happened.
    """

    target: int
    faults: list[Fault]
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                fault = self.faults.pop() if self.faults else None
            threading.Thread(target=self._forward, args=(client, fault), daemon=True).start()

    def _forward(self, client: socket.socket, fault: Fault | None) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            client.close()
            return
        threading.Thread(target=_copy, args=(client, server), daemon=True).start()
        passed = 0
        try:
            while data := server.recv(65536):
                if fault is not None and passed + len(data) > fault.after:
                    at = max(0, fault.after - passed)
                    self.done.append(fault.kind)
                    if not _strike(fault.kind, client, data, at):
                        return
                    fault = None
                else:
                    client.sendall(data)
                passed += len(data)
        except OSError:
            pass
        finally:
            for end in (client, server):
                # The other thread waits on it; a close alone would not wake it, nor reach the peer.
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()


def _strike(kind: str, client: socket.socket, data: bytes, at: int) -> bool:
    """Does something to the bytes from `at` on; returns whether the connection goes on."""
    if kind == "cut":
        return False
    if kind == "truncate":
        client.sendall(data[:at])
        return False
    if kind == "delay":
        time.sleep(random.uniform(0.5, 1.5))
        client.sendall(data)
        return True
    assert kind == "flip", kind
    damaged = bytearray(data)
    damaged[min(at, len(data) - 1)] ^= 1 << random.randrange(8)
    client.sendall(damaged)
    return True


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass
