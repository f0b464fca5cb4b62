"""Names that stand for patients: keyed by a secret of the site, so that nobody else can undo them."""

import hashlib
import hmac
import secrets
from pathlib import Path

import numpy as np
from jaxtyping import Int

from fedssl.storage import atomic_file


def site_secret(folder: Path) -> bytes:
    """Return the site's key for pseudonyms, made on first use (file mode 600)."""
    path = folder / "site.secret"
    if not path.exists():
        with atomic_file(path, "the site's secret") as stream:
            stream.write(secrets.token_bytes(32))
    return path.read_bytes()


def pseudonym(secret: bytes, *parts: str) -> str:
    """Return 64 bits of HMAC-SHA256 (RFC 2104) of the parts as hexadecimal digits."""
    return hmac.new(secret, "\0".join(parts).encode(), hashlib.sha256).hexdigest()[:16]


def public_hash(*parts: str) -> int:
    """Return a 16-bit hash that is the same everywhere: enough to order patients, too little to find one's ID from it.

    Who already has a patient's ID can tell that the patient is probably in an index: it must not leave the site.
    """
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:2], "big")


def numbered(patients: np.ndarray) -> Int[np.ndarray, " images"]:
    """Number patients by their first image: pseudonyms differ from machine to machine, these numbers do not."""
    _, first, inverse = np.unique(patients, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
