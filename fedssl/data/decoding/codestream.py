"""What compressed frames say of their own size, read before a decoder takes memory for it."""

import struct
import zlib

_JPEG_SIZE = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOFn (ITU-T T.81, table B.1) and SOF55 (T.87)
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_PIECE = 2**16
_J2K_SIZ = b"\xff\x4f\xff\x51"  # SOC, SIZ (ITU-T T.800, A.5.1)


def frame_size(codestream: bytes) -> tuple[int, int] | None:
    """Return (rows, columns) that a JPEG, JPEG-LS or JPEG 2000 codestream announces; None where it says nothing."""
    if codestream[:2] == b"\xff\xd8":
        return _jpeg_size(codestream)
    start = codestream[:4096].find(_J2K_SIZ)
    if start >= 0 and len(codestream) >= start + 24:
        right, bottom, left, top = struct.unpack_from(">4I", codestream, start + 8)
        return bottom - top, right - left
    return None


def _jpeg_size(codestream: bytes) -> tuple[int, int] | None:
    place = 2
    while place + 9 <= len(codestream) and codestream[place] == 0xFF:
        marker = codestream[place + 1]
        if marker in _JPEG_SIZE:
            rows, columns = struct.unpack_from(">2H", codestream, place + 5)
            return rows, columns
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            place += 1 if marker == 0xFF else 2
        else:
            place += 2 + struct.unpack_from(">H", codestream, place + 2)[0]
    return None


def refuse_other_size(codestream: bytes, rows: int, columns: int) -> None:
    """Refuse a frame whose codestream is larger than its header says.

    Raises:
        ValueError: it is.
    """
    announced = frame_size(codestream)
    if announced and (announced[0] > rows or announced[1] > columns):
        raise ValueError("holds a compressed frame that is larger than its header says")


def refuse_bomb(deflated: bytes, most: int) -> None:
    """Inflate a raw deflate stream (PS3.5, A.5) piece by piece without keeping it, and stop when it grows too large.

    Raises:
        ValueError: it inflates to more than ``most`` bytes.
    """
    stream, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    for start in range(0, len(deflated), _PIECE):
        piece = deflated[start : start + _PIECE]
        while piece and not stream.eof:
            total += len(stream.decompress(piece, _PIECE))
            piece = stream.unconsumed_tail
            if total > most:
                raise ValueError(f"is deflated and grows beyond {most} bytes")
