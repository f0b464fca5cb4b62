"""What goes wrong with a DICOMweb server, said in sentences, and how long to bear it.

dicomweb-client's own retries are not used: they sleep without a word, without jitter and without an upper bound.
"""

import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import requests
from urllib3 import exceptions as urllib3_errors

_LONGEST_PAUSE_S = 60.0
_CHECK_ROOT = "Check that the address is the DICOMweb root (what comes before /studies)."
_CHECK_HOST = "Check the host and the port in the address, that the server runs, and the firewall between."
CREDENTIALS = "Set FEDSSL_DICOMWEB_USER and FEDSSL_DICOMWEB_PASSWORD, or FEDSSL_DICOMWEB_TOKEN, to what it expects."
_CERTIFICATE = "For a hospital's own certificate authority set REQUESTS_CA_BUNDLE; without TLS write dicomweb+http://."
_NO_DICOMWEB = "does not answer as DICOMweb does (no DICOM JSON)"
_Answer = TypeVar("_Answer")


@dataclass(eq=False)
class Trouble(Exception):  # noqa: N818 - becomes an error of fedssl, or a line in the count of what failed
    """A request that came to nothing. ``reason`` goes on after "the server".

    ``again``: one more attempt may help. ``astray``: if the server never answered well, the address is wrong.
    """

    reason: str
    advice: str = "Try again later: the same command goes on where it stopped."
    again: bool = False
    astray: bool = False
    status: int = 0
    retry_after: float = 0.0

    def sentence(self) -> str:
        """Say what is wrong and what to do."""
        return f"The DICOMweb server {self.reason}. {self.advice}"


_BY_STATUS = {
    300: ("sends to another address", "Give the final address instead."),
    400: ("does not understand the search (400)", f"{_CHECK_ROOT} Leave out filters that it does not know."),
    401: ("does not accept the credentials (401)", CREDENTIALS),
    403: ("refuses access (403)", CREDENTIALS),
    404: ("knows no such resource (404)", _CHECK_ROOT),
}
_BY_ERROR: tuple[tuple[type[Exception], str, str, bool], ...] = (
    (requests.exceptions.ProxyError, "cannot be reached through the proxy", "Check HTTPS_PROXY and NO_PROXY.", True),
    (requests.exceptions.SSLError, "shows no certificate that can be verified", _CERTIFICATE, True),
    (requests.exceptions.InvalidJSONError, _NO_DICOMWEB, _CHECK_ROOT, True),
    (requests.exceptions.InvalidURL, "has an impossible address", _CHECK_HOST, True),
    (requests.exceptions.ConnectTimeout, "does not accept connections (no answer in time)", _CHECK_HOST, True),
    (urllib3_errors.NameResolutionError, "has a host name that nobody knows", _CHECK_HOST, True),
    (urllib3_errors.NewConnectionError, "does not accept connections", _CHECK_HOST, True),
    (urllib3_errors.ReadTimeoutError, "does not answer in time", Trouble.advice, False),
    (Exception, "broke the connection off", Trouble.advice, False),
)


@contextmanager
def explained() -> Iterator[None]:
    """Turn errors into trouble; their own text holds addresses, and with them UIDs, and is never shown."""
    try:
        yield
    except (requests.RequestException, urllib3_errors.HTTPError, OSError, ValueError) as error:
        inner = error.args[0] if error.args else error
        chain = (error, inner, getattr(inner, "reason", None))
        reason, advice, astray = next(row[1:] for row in _BY_ERROR if any(isinstance(link, row[0]) for link in chain))
        raise Trouble(reason, advice, again=True, astray=astray) from None


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server and how to tell; shared by all connections of one run.

    ``timeout``: seconds for connecting, and for silence within an answer. ``pause``: seconds before the second
    attempt, doubled each time up to a minute.
    """

    retries: int
    timeout: tuple[float, float]
    pause: float
    tell: Callable[[str], None]
    stop: threading.Event
    heard: threading.Event = field(default_factory=threading.Event)

    def ask(self, request: Callable[[], _Answer], attempt: int = 1) -> _Answer:
        """Make a request, and again after a pause with jitter while that may help."""
        try:
            answer = request()
        except Trouble as trouble:
            hopeless = not trouble.again or (trouble.astray and not self.heard.is_set())
            if hopeless or attempt > self.retries or self.stop.is_set():
                raise
            pause = min(_LONGEST_PAUSE_S, max(trouble.retry_after, self.pause * 2 ** (attempt - 1)))
            pause *= random.uniform(1.0, 1.5)  # noqa: S311 - so that connections do not come back all at once
            which = f"attempt {attempt + 1} of {self.retries + 1}"
            self.tell(f"The DICOMweb server {trouble.reason}; {which} follows in {pause:.0f} s.")
        else:
            self.heard.set()
            return answer
        self.stop.wait(pause)
        return self.ask(request, attempt + 1)


def refuse_status(response: requests.Response) -> None:
    """Turn any status but success (RFC 9110, section 15) into trouble before the body is read."""
    status, after = response.status_code, re.fullmatch(r"\d{1,6}", response.headers.get("Retry-After", ""))
    if status >= 300:
        response.close()
        unknown = (f"answers with an error ({status})", Trouble.advice)
        reason, advice = _BY_STATUS.get(status if status >= 400 else 300, unknown)
        again = status in {408, 429} or status >= 500
        raise Trouble(reason, advice, again=again, status=status, retry_after=float(after[0]) if after else 0.0)
