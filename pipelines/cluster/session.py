"""ROOM: Ray, what a Ray that is started on this machine needs of its own: a private folder.

In: nothing. Out: a folder that only this user may enter, with Ray's session and token, and a path
of Python that Ray can start. Must not know what runs on the cluster.

Ray makes its session folder writable for everybody: another user of the machine could read the
environment of jobs there, and change their code. It writes its token to ~/.ray, readable for
everybody, and fails where there is no home. And it starts workers with a line for the shell in
which the path of Python isn't quoted.
"""

from __future__ import annotations

import errno
import getpass
import os
import secrets
import shlex
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.core.errors import TesseraError

PREFIX = "tessera-ray-"
_MOST_BYTES = 16
"""Of the folder of temporary files: with Ray's session below it, the path of a socket may have 107
bytes."""
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def make_private_folder() -> Path:
    """A new folder, which only this user may enter, with a short path without spaces.

    Raises TesseraError if none can be made.
    """
    usual = tempfile.gettempdir()
    is_fit = len(os.fsencode(usual)) <= _MOST_BYTES and shlex.quote(usual) == usual
    root = usual if is_fit else "/tmp"
    try:
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    except OSError as error:
        raise TesseraError(
            f"Ray needs a folder below {root}, which can't be written: {error.strerror}",
            hint="free some space there, or set TMPDIR to another folder with a short path",
        ) from error


def ray_folder(folder: Path) -> Path:
    """Where Ray has its sessions in a private folder. Ray opens it to all users, who can't get
    there."""
    return folder / "r"


def write_private(path: Path, text: str) -> Path:
    """Writes a file that only this user may read, from its first byte on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    return path


def open_to_others(path: Path) -> str:
    """Why a file with a secret isn't safe, or a folder with what is executed; empty if it is, or
    if there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    if status.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user"
    if stat.S_IMODE(status.st_mode) & 0o077:
        return f"{path} is open to other users (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def user_name() -> str:
    """The name of this user; of one without a name, as containers have, its number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid{os.getuid()}"


def token_file() -> Path:
    """Where Ray looks for the token of a cluster that is joined."""
    return Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def protect_token() -> None:
    """Closes a token that Ray or a user wrote open to others. One that is mounted read-only, as
    the secrets of containers are, is left to who mounted it. Raises TesseraError if it belongs to
    another user."""
    if os.environ.get(TOKEN):
        return
    try:
        path = token_file()
    except RuntimeError:  # without a home there is no token in it
        return
    if not (problem := open_to_others(path)):
        return
    try:
        path.chmod(0o600)
    except OSError as error:
        if error.errno == errno.EROFS:
            return
        raise TesseraError(
            f"{problem}, and can't be closed: {error.strerror}",
            hint=f"use a token of your own: {TOKEN_PATH}",
        ) from error


def use_own_token(folder: Path) -> None:
    """Lets a Ray that is started in this process use a token in `folder`, unless the user set one.
    `forget` removes it from the environment, where Ray's processes read it."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    if not os.environ.get(TOKEN) and not os.environ.get(TOKEN_PATH):
        path = write_private(folder / "token", secrets.token_hex(32))
        os.environ[TOKEN_PATH] = str(path)
        AuthenticationTokenLoader.instance().reset_cache()


def is_open_to_others(folder: Path) -> bool:
    """Whether another user of this machine may write to the folder: its mode says so, and that of
    no folder above keeps them out."""
    above = folder.resolve()
    others_write = above.stat().st_mode & stat.S_IWOTH
    return bool(others_write) and all(
        parent.stat().st_mode & stat.S_IXOTH for parent in (above, *above.parents)
    )


def forget(folder: Path) -> None:
    """Removes a private folder, and its token from the environment."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.environ.get(TOKEN_PATH) == str(folder / "token"):
        from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

        del os.environ[TOKEN_PATH]
        AuthenticationTokenLoader.instance().reset_cache()


def python(folder: Path) -> str:
    """The path of this Python for Ray's processes: its own, or, if that has a space or another
    character that a shell doesn't take, one by a link in `folder`. A virtual environment is found
    by the link, too."""
    own = Path(sys.executable)
    if shlex.quote(str(own)) == str(own):
        return str(own)
    link = folder / "python"
    if not link.exists():
        link.symlink_to(own.parent.parent)
    return str(link / own.parent.name / own.name)


@contextmanager
def started_by(executable: str) -> Iterator[None]:
    """Lets Ray start its processes with this Python."""
    before, sys.executable = sys.executable, executable
    try:
        yield
    finally:
        sys.executable = before
