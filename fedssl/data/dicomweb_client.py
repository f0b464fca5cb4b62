"""One DICOMweb server (DICOM PS3.18): searches (QIDO-RS), instances as stored (WADO-RS), waits that end and are told.

dicomweb-client asks and reads the searches, but its requests carry a Host header without the port, ``%2A`` for ``*``
and ``+`` for a space, which some servers take literally: that is put right. Its ``retrieve_instance`` is not used: it
holds an instance several times in memory, takes a body that broke off for a whole one, and gives a parsed dataset, so
that the archive's own bytes are lost.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.message import Message
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import requests
from dicomweb_client.web import DICOMwebClient
from pydicom import dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from requests.auth import HTTPBasicAuth

from fedssl.data.dicomweb_trouble import CREDENTIALS, Patience, Trouble, explained, refuse_status
from fedssl.errors import ConfigError

for _name in ("dicomweb_client.web", "urllib3.connectionpool"):  # they log addresses, and with them UIDs
    logging.getLogger(_name).addFilter(lambda record: False)  # noqa: ARG005

PAGE = 500
LARGEST_INSTANCE, _LARGEST_PAGE = 4 * 2**30, 64 * 2**20
_BLOCK, _SLOWEST_BYTES_PER_S = 2**18, 1024.0
_AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'  # PS3.18, section 8.7.3
_ADDRESS = re.compile(r"dicomweb\+(https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?(/[^?#\s]*)?)")
_UID = re.compile(r"[0-9.]{1,64}")  # PS3.5, section 9.1; leading zeros exist
# Filters choose kinds of images, never a person: no name, identifier or UID is among them.
STUDY_FILTERS = ("StudyDate", "StudyDescription", "ModalitiesInStudy", "PatientSex")
SERIES_FILTERS = ("Modality", "BodyPartExamined", "SeriesDescription", "ProtocolName", "Manufacturer")
_DATES = re.compile(r"(\d{8})?-(\d{8})?")
_NO_PAGES = "gives the same page whichever is asked for, so that not all of it can be seen"

Item = dict[str, Any]


class Server:
    """A connection to a server, for one thread."""

    def __init__(self, address: str, patience: Patience) -> None:
        authorise = authorisation()

        def prepared(request: requests.PreparedRequest) -> requests.PreparedRequest:
            request.headers.pop("Host", None)  # http.client sends the right one
            root, mark, query = str(request.url).partition("?")
            request.url = root + mark + query.replace("%2A", "*").replace("%2C", ",").replace("+", "%20")
            return authorise(request)

        def received(response: requests.Response, *_: object, **__: object) -> None:
            refuse_status(response)
            self._more_remains = response.headers.get("Warning", "").startswith("299")  # PS3.18, section 8.3.4
            limit = LARGEST_INSTANCE if response.request.headers["Accept"] == _AS_STORED else _LARGEST_PAGE
            read = partial(response.raw.read1, _BLOCK, decode_content=True)
            response.raw.stream = lambda *_, **__: _bounded(read, limit, patience.timeout[1])

        self.address, self.patience, self._session = address, patience, requests.Session()
        self._more_remains = False
        self._session.auth = prepared  # set, so that no .netrc is looked into
        self._session.hooks["response"] = [received]
        self._session.headers["Accept-Encoding"] = "identity"
        self._client = DICOMwebClient(address, self._session, permissive_uid=True, timeout=patience.timeout)
        self._client.set_http_retry_params(retry=False)

    def pages(
        self, key: str, filters: Mapping[str, str], fields: Sequence[str], within: Sequence[str] = (), most: int = 0
    ) -> Iterator[list[Item]]:
        """Search (QIDO-RS, PS3.18, section 10.6) for what ``key`` tells apart, below the UIDs ``within``.

        Pages have whatever size the server allows. What moves to the next page because the archive grew meanwhile
        is given once. Knowing that there are ``most`` matches saves asking for the page after the last.
        """
        client, offset, last = self._client, 0, set[str]()
        levels = (client.search_for_studies, client.search_for_series, client.search_for_instances)
        search: Callable[..., Any] = levels[len(within)]

        def page() -> list[Item]:
            with explained():
                place = {"limit": PAGE, "offset": offset or None}
                found = search(*within, fields=list(fields), search_filters=dict(filters), **place)
                if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
                    raise requests.exceptions.InvalidJSONError
                return found

        refuse_uids(*within)
        while found := self.patience.ask(page):
            fresh = [item for item in found if text(item, key) not in last]
            if not fresh and (len(found) >= PAGE or self._more_remains):
                raise Trouble(_NO_PAGES, "Ask its vendor for paging (limit and offset), or narrow the filters.")
            yield fresh
            last = {text(item, key) for item in found}
            offset += len(found)
            if not fresh or 0 < most <= offset:
                return

    def instance(self, *uids: str) -> Iterator[bytes]:
        """Give the bytes of an instance as stored (WADO-RS, PS3.18, section 10.4) as they arrive; asks once."""
        refuse_uids(*uids)
        address = "{}/studies/{}/series/{}/instances/{}".format(self.address, *uids)
        wanted: dict[str, Any] = {"headers": {"Accept": _AS_STORED}, "timeout": self.patience.timeout}
        with explained(), self._session.get(address, stream=True, **wanted) as response:
            kind, blocks = Message(), response.iter_content(_BLOCK)
            kind["Content-Type"] = response.headers.get("Content-Type", "")
            boundary = str(kind.get_param("boundary", ""))
            ends = "Content-Length" in response.headers or "Transfer-Encoding" in response.headers
            if kind.get_content_type() == "multipart/related" and boundary:
                yield from _part(blocks, b"\r\n--" + boundary.encode())
            elif kind.get_content_type() == "application/dicom" and ends:  # else a body cut off looks whole
                yield from blocks
            else:
                raise Trouble("sends something else than a DICOM file")


def address_of(url: str) -> str:
    """Return the http(s) address in ``dicomweb+http(s)://...``."""
    if "@" in url:
        raise ConfigError(f"The address holds a user or a password, which others could read. {CREDENTIALS}")
    if not (parts := _ADDRESS.fullmatch(url)):
        raise ConfigError("The address is none of a DICOMweb server. Write dicomweb+https://HOST:PORT/dicom-web.")
    return parts[1].rstrip("/")


def authorisation() -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    """Return what puts the credentials of the environment into a request (RFC 7617 or RFC 6750)."""
    user, password, token = (os.environ.get(f"FEDSSL_DICOMWEB_{name}", "") for name in ("USER", "PASSWORD", "TOKEN"))
    if bool(user) != bool(password) or (user and token) or not re.fullmatch(r"[!-~]*", token):
        raise ConfigError(f"The credentials are incomplete, double or hold impossible characters. {CREDENTIALS}")
    bundle = os.environ.get("REQUESTS_CA_BUNDLE")
    if bundle and not Path(bundle).exists():
        raise ConfigError("REQUESTS_CA_BUNDLE names no file. Correct it, or unset it for public certificates.")

    def authorised(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return HTTPBasicAuth(user.encode(), password.encode())(request) if user else request

    return authorised


def text(item: Item, keyword: str) -> str:
    """Return the values of an attribute in DICOM JSON (PS3.18, annex F) joined by backslashes, or nothing."""
    element = item.get(f"{tag_for_keyword(keyword):08X}")
    given = element.get("Value") if isinstance(element, dict) else None
    return "\\".join(str(value).strip() for value in given if value is not None) if isinstance(given, list) else ""


def number(item: Item, keyword: str) -> int:
    """Return an attribute that counts; 0 if it is missing or none."""
    digits = re.match(r"\d{1,9}", text(item, keyword))
    return int(digits[0]) if digits else 0


def split(filters: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Part the filters in those on studies and those on series; refuse what no search can use."""
    unknown = sorted(set(filters) - {*STUDY_FILTERS, *SERIES_FILTERS})
    if unknown:
        raise ConfigError(
            f"No filter is called {', '.join(unknown)}. There are {', '.join(STUDY_FILTERS + SERIES_FILTERS)}."
        )
    for keyword, wanted in filters.items():
        if not wanted.strip():
            raise ConfigError(f"The filter {keyword} has no value. Give one, or leave the filter out.")
    dates = filters.get("StudyDate", "00000000")
    if dates == "-" or not (_DATES.fullmatch(dates) or re.fullmatch(r"\d{8}", dates)):
        raise ConfigError("The filter StudyDate is no date. Write YYYYMMDD, or YYYYMMDD-YYYYMMDD for a range.")
    of_study = {keyword: wanted for keyword, wanted in filters.items() if keyword in STUDY_FILTERS}
    return of_study, {keyword: wanted for keyword, wanted in filters.items() if keyword not in of_study}


def matches(found: str, wanted: str) -> bool:
    """Tell whether a value fits a filter: a range of dates, a list, wildcards (PS3.4, section C.2.2.2)."""
    if dates := _DATES.fullmatch(wanted):
        return (dates[1] or "") <= found <= (dates[2] or "99999999") and found != ""
    patterns = [pattern.strip().lower().replace("[", "[[]") for pattern in (wanted, *wanted.split(","))]
    return any(fnmatchcase(one.lower(), pattern) for one in found.split("\\") for pattern in patterns)


def refuse_uids(*uids: str) -> None:
    """Refuse what is no UID; it would become part of an address."""
    if not all(_UID.fullmatch(uid) for uid in uids):
        raise Trouble("lists something without a valid UID")


def refuse_another(path: Path, uid: str) -> None:
    """Refuse a file that is no DICOM, or whose SOPInstanceUID (0008,0018) is not the one asked for."""
    try:
        held = dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"]).get_item("SOPInstanceUID")
        value = held.value if isinstance(held, RawDataElement) else None  # raw: pydicom warns with values it converts
    except Exception:  # noqa: BLE001 - a damaged file raises anything
        raise Trouble("sends something else than a DICOM file") from None
    if (value or b"").rstrip(b"\0 ").decode("ascii", "replace") != uid:
        raise Trouble("sends another image than the one asked for")


def _bounded(read: Callable[[], bytes], limit: int, grace: float) -> Iterator[bytes]:
    """Give a body of at most ``limit`` bytes that does not crawl (a timeout alone allows a byte a minute)."""
    start, size = time.monotonic(), 0
    while block := read():
        size += len(block)
        if size > limit:
            raise Trouble("sends more bytes than allowed")
        if time.monotonic() - start > grace + size / _SLOWEST_BYTES_PER_S:
            raise Trouble("sends too slowly", again=True)
        yield block


def _part(blocks: Iterator[bytes], mark: bytes) -> Iterator[bytes]:
    """Give the body of the only part of a multipart message (RFC 2046, section 5.1) without holding it."""
    held = _after(b"\r\n\r\n", _after(mark, b"\r\n", blocks), blocks)
    while mark not in held:
        sure = max(0, len(held) - len(mark) + 1)
        yield held[:sure]
        held = held[sure:] + _more(blocks)
    body, _, held = held.partition(mark)
    yield body
    while len(held) < 2:
        held += _more(blocks)
    if not held.startswith(b"--"):
        raise Trouble("sends more than the one image asked for")
    for _block in blocks:
        pass  # to its end, so that the connection can be used again


def _after(mark: bytes, held: bytes, blocks: Iterator[bytes]) -> bytes:
    while mark not in held:
        held = held[-len(mark) :] + _more(blocks)
    return held.partition(mark)[2]


def _more(blocks: Iterator[bytes]) -> bytes:
    block = next(blocks, b"")
    if not block:
        raise Trouble("broke an image off in the middle", again=True)
    return block
