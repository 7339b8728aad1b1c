"""What stands between a client and a server, and can be cut."""

import socket
import threading


class Relay:
    """What rank 0 reaches the server through; a test cuts it, or drops what comes back."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_cut = self._is_mute = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection, and each new one."""
        with self._lock:
            self._is_cut = True
            self._drop()

    def mute(self) -> None:
        """Let requests through, and no answer."""
        self._is_mute = True

    def restore(self) -> None:
        """Let everything through again, on new connections."""
        with self._lock:
            self._is_cut = self._is_mute = False
            self._drop()

    def close(self) -> None:
        self.cut()
        self._listener.close()

    def _drop(self) -> None:
        for item in self._sockets:
            try:
                item.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._sockets.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._is_cut:
                    client.close()
                    continue
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                self._sockets += [client, server]
            for source, sink, answers in ((client, server, False), (server, client, True)):
                threading.Thread(
                    target=self._pump, args=(source, sink, answers), daemon=True
                ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with source:
            try:
                while data := source.recv(65536):
                    if not (answers and self._is_mute):
                        sink.sendall(data)
                sink.shutdown(socket.SHUT_RDWR)
            except OSError:
                return
