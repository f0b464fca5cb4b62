"""What the server asks of a site."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """One request.

    Attributes:
        run: random name of the run.
        number: the round; 0 is the roll call: who is there, with which configuration.
        rounds: of the whole federation.
        fingerprint: of the configuration.
        contrast: factor of the contrastive term in this round.
        last: the last round of this run in which the server took this site's answer; 0: none. The site goes on from its
            own state after that round.
        ledger: what the server last heard of the site's privacy ledger: number and hash of its newest entry; or empty.
        precision: of numbers on the wire: ``float32``, ``float16`` or ``bfloat16``.
    """

    run: str
    number: int
    rounds: int
    fingerprint: str
    contrast: float = 1.0
    last: int = 0
    ledger: str = ""
    precision: str = "float32"
