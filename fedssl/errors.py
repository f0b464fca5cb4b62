"""Errors that reach a person: what is wrong, what was found, what to do. Each kind has an exit code.

No message may hold a path below the data root, a DICOM tag's value, a UID or anything else that could name a patient.
"""


class FedsslError(Exception):
    """A failure that fedssl can explain. ``exit_code`` is what the command returns."""

    exit_code = 1


class ConfigError(FedsslError):
    """A setting is unknown, missing or impossible (exit code 2)."""

    exit_code = 2


class DataError(FedsslError):
    """Images, patients or labels are missing or unusable (exit code 3)."""

    exit_code = 3


class FederationError(FedsslError):
    """Too few sites answered, or an answer was refused (exit code 4)."""

    exit_code = 4


class StorageError(FedsslError):
    """A disk is full or a file could not be written (exit code 5)."""

    exit_code = 5


class PrivacyError(FedsslError):
    """A privacy budget is spent, or the ledger that counts it cannot be trusted (exit code 6)."""

    exit_code = 6


class PolicyError(FedsslError):
    """The hospital's policy does not admit what was asked (exit code 7)."""

    exit_code = 7


class UpdateRefused(FederationError):  # noqa: N818 - an answer is refused; the run goes on with the others
    """One site's answer does not fit the shared state; ``site`` and ``reason`` say which and why."""

    def __init__(self, site: str, reason: str) -> None:
        super().__init__(f"Site {site}: {reason}")
        self.site = site
        self.reason = reason


INTERRUPTED_EXIT_CODE = 130
