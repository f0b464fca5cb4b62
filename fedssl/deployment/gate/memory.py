"""What the gate remembers of callers for minutes: who failed, and which signatures were used."""

import hashlib
from collections import OrderedDict, deque
from time import monotonic

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

_MINUTE_S, _MOST_FAILURES, _MOST_CALLERS = 60.0, 20, 4096


class Failures:
    """Failed requests of the last minute by caller; who was not heard longest is forgotten first."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, who: str) -> float:
        """Tell for how long a caller is not listened to."""
        times = self._times.get(who, deque[float]())
        return max(0.0, times[0] + _MINUTE_S - monotonic()) if len(times) == _MOST_FAILURES else 0.0

    def add(self, who: str) -> bool:
        """Count a failure; tells whether it is the caller's first in this minute."""
        times = self._times.setdefault(who, deque(maxlen=_MOST_FAILURES))
        self._times.move_to_end(who)
        if len(self._times) > _MOST_CALLERS:
            self._times.popitem(last=False)
        first = not times or monotonic() - times[-1] > _MINUTE_S
        times.append(monotonic())
        return first


class Signatures:
    """Signatures that were used not long ago.

    Of an ECDSA signature (r, s) only r is remembered: whoever sees one can make the valid (r, n - s) of it, but no
    other r without the private key. What is remembered is bounded by what the known keys can sign in that time.

    Args:
        kept_s: for how long one is remembered: twice as long as it is valid, in case that the clock is set back.
    """

    def __init__(self, kept_s: float) -> None:
        self._kept_s = kept_s
        self._used: dict[bytes, float] = {}

    def is_new(self, key: bytes, signature: bytes) -> bool:
        """Remember a valid signature; tells whether it had not been used."""
        now = monotonic()
        while self._used and now - (oldest := next(iter(self._used.items())))[1] > self._kept_s:
            del self._used[oldest[0]]
        mark = hashlib.sha256(key + b"%x" % decode_dss_signature(signature)[0]).digest()[:16]
        if mark in self._used:
            return False
        self._used[mark] = now
        return True
