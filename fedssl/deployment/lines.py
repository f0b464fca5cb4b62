"""The agent's Unix socket: who may ask, and one question at a time."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from fedssl import progress
from fedssl.errors import ConfigError, FedsslError, StorageError
from fedssl.frames import Frame, read_frame, send_frame

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: SO_PEERCRED
_READ_S = 600.0
_WAITING, _AT_ONCE = 16, 4
_CHUNK = 1 << 20


def listen(path: Path) -> socket.socket:
    """Open the socket ``path``; one that a killed agent left is replaced.

    Raises:
        ConfigError: another agent answers there, or the path is too long for a socket.
        StorageError: it cannot be made.
    """
    line = socket.socket(socket.AF_UNIX)
    try:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX) as other:
            other.connect(str(path))
            raise ConfigError("Another agent of this kit is running. Stop it, or leave it as it is.")
        path.unlink(missing_ok=True)
        line.bind(str(path))
        path.chmod(0o660)
    except OSError as error:
        if "too long" in str(error):
            raise ConfigError("The socket's path is longer than 107 bytes; give a shorter one in site.yaml.") from error
        raise StorageError(
            f"The agent's socket could not be made ({error.strerror}). Check the folder's rights."
        ) from error
    line.listen(_WAITING)
    return line


class Lines:
    """Answers the relay's questions.

    Args:
        line: listening socket.
        allowed: users (uid) who may ask.
        answer: gives the parts of the frame that goes back, also to a question that cannot be read; called by one
            thread at a time.
        most_bytes: of a question's arrays, asked for each.
    """

    def __init__(
        self,
        line: socket.socket,
        allowed: frozenset[int],
        answer: Callable[[Frame | FedsslError], list[bytes]],
        most_bytes: Callable[[], int],
    ) -> None:
        self.line = line
        self.allowed = allowed
        self.answer = answer
        self.most_bytes = most_bytes
        self.turn = threading.Lock()
        self.places = threading.BoundedSemaphore(_AT_ONCE)  # a relay that asks without end must not fill the memory

    def serve(self) -> None:
        """Answer until the socket is closed."""
        for connection in self._connections():
            if self.places.acquire(blocking=False):
                threading.Thread(target=self._place, args=(connection,), daemon=True).start()
            else:
                connection.close()  # an honest relay asks again

    def _place(self, connection: socket.socket) -> None:
        try:
            self._talk(connection)
        finally:
            self.places.release()

    def _connections(self) -> Iterator[socket.socket]:
        while True:
            try:
                yield self.line.accept()[0]
            except OSError:
                return

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            _, user, _ = _CREDENTIALS.unpack(told)
            if user not in self.allowed:
                text = f"A user (uid {user}) who is not the relay's asked the agent and got nothing."
                progress.publish(progress.Note(text, alarm=True))
                return
            try:
                connection.settimeout(_READ_S)
                question = self._question(connection)
                if question is not None:
                    with self.turn:
                        parts = self.answer(question)
                    send_frame(connection.sendall, parts)
            except OSError:  # the relay was killed; it asks again
                progress.publish(progress.Note("The relay went away before it had its answer."))

    def _question(self, connection: socket.socket) -> Frame | FedsslError | None:
        """Read what is asked; of what cannot be read nothing is kept, but the relay may end its sentence."""
        with connection.makefile("rb") as stream:
            try:
                return read_frame(stream, self.most_bytes())
            except FedsslError as error:
                while stream.read(_CHUNK):
                    pass
                return error
