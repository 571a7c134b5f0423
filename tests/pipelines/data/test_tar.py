"""Only regular files with intact headers are members of a shard."""

from __future__ import annotations

import tarfile

import pytest

from models.core.errors import TesseraError
from pipelines.data.tar import members


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    info.linkname = "target" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % 512)


def test_valid_members_are_listed() -> None:
    data = member("d/a.cls", b"1") + member("d/a.png", b"x" * 600)
    assert members(data, "here") == [("d/a.cls", 512, 1), ("d/a.png", 1536, 600)]


@pytest.mark.fault(11)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (member("a.jpg", kind=tarfile.SYMTYPE), "type b'2' is refused"),
        (member("a.jpg", kind=tarfile.LNKTYPE), "type b'1' is refused"),
        (member("a.jpg", kind=tarfile.FIFOTYPE), "type b'6' is refused"),
        (member("a.jpg", kind=tarfile.CHRTYPE), "type b'3' is refused"),
        (member("a.jpg", kind=tarfile.GNUTYPE_SPARSE), "type b'S' is refused"),
        (member("a.jpg", kind=tarfile.XHDTYPE), "type b'x' is refused"),
        (member("a.jpg", kind=tarfile.DIRTYPE), "type b'5' is refused"),
        (member("a.jpg", size=7 << 30), "cut short"),
        (b"\0" * 124 + b"\x80" + b"\0" * 132 + b"ustar\0" + b"\0" * 249, "has the invalid number"),
        (member("a.jpg", size=513) + b"\0" * 512, "cut short"),
        (member("a.jpg")[:300], "cut short"),
        (b"\0" * 1024, "not a ustar header"),
        (b"<html>" + b" " * 506, "not a ustar header"),
    ],
)
def test_other_members_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(TesseraError, match=rf"^here: .*({message})"):
        members(data, "here")
