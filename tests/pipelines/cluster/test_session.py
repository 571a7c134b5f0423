"""The private folder of a Ray that is started here: who may enter, and how Python is called."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from models.core.errors import TesseraError
from pipelines.cluster import session


def test_the_folder_is_private_and_its_path_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for usual in (tmp_path, tmp_path / "with space", Path("/tmp")):
        monkeypatch.setattr(tempfile, "tempdir", str(usual))
        folder = session.make_private_folder()
        try:
            assert folder.parent == Path("/tmp")
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            socket = "session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
            assert len(str(session.ray_folder(folder) / socket)) <= 107
        finally:
            folder.rmdir()


def test_a_file_is_private_from_its_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    path.chmod(0o644)
    assert "is open to other users (mode 644)" in session.open_to_others(path)
    assert session.write_private(path, "new").read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert session.open_to_others(path) == ""
    assert session.open_to_others(tmp_path / "none") == ""
    if not os.geteuid():
        os.chown(path, 54321, 54321)
        assert "belongs to another user" in session.open_to_others(path)


def test_a_token_that_ray_wrote_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (session.TOKEN, session.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    session.protect_token()  # there is none
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(0o644)
    session.protect_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    if not os.geteuid():
        folder = tmp_path / "elsewhere"
        folder.write_text("")
        os.chown(folder, 54321, 54321)
        monkeypatch.setenv(session.TOKEN_PATH, str(folder))
        session.protect_token()  # root may close it
        assert stat.S_IMODE(folder.stat().st_mode) == 0o600


UNSHARE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
PROTECT = "from pipelines.cluster import session; session.protect_token()"


@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="no mount namespace can be made here",
)
@pytest.mark.parametrize("mounted", [True, False])
def test_a_token_that_is_mounted_is_left_as_it_is(mounted: bool, tmp_path: Path) -> None:
    """As a secret in a container: the one who mounted it decides who may read it."""
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o444)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"' if mounted else "true"
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", f'{mount} && exec "$@"', token, sys.executable, "-c", PROTECT],
        env={"PATH": os.environ["PATH"], session.TOKEN_PATH: str(token)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(token.stat().st_mode) == (0o444 if mounted else 0o600)


def test_a_folder_is_open_only_if_the_way_to_it_is(tmp_path: Path) -> None:
    outer = Path(tempfile.mkdtemp(prefix="tessera-test-", dir="/tmp"))
    inner = outer / "inner"
    inner.mkdir()
    try:
        inner.chmod(0o777)
        assert not session.is_open_to_others(inner)
        outer.chmod(0o755)
        assert session.is_open_to_others(inner)
        inner.chmod(0o755)
        assert not session.is_open_to_others(inner)
    finally:
        inner.rmdir()
        outer.rmdir()


@pytest.mark.parametrize("name", ["with space", "it's", "猫 😀", "$(x)", 'say "hi"'])
def test_python_in_an_odd_folder_is_called_by_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own = session.python(tmp_path)
    assert own == sys.executable, "the control: an ordinary path stays"
    odd = tmp_path / name
    odd.symlink_to(sys.prefix)
    monkeypatch.setattr(sys, "executable", str(odd / "bin" / Path(own).name))
    link = session.python(tmp_path)
    assert link == str(tmp_path / "python" / "bin" / Path(own).name)
    line = f"{link} -c 'import sys, numpy; print(sys.prefix)'"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "python")
    with session.started_by(link):
        assert sys.executable == link
    assert sys.executable != link


def test_a_folder_of_temporary_files_that_cannot_be_written_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no-such")
    with pytest.raises(TesseraError, match=r"Ray needs a folder below /no-such"):
        session.make_private_folder()


def test_every_user_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert session.user_name()
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert session.user_name() == "uid54321"
