"""While a data set is read, no pickle loads anything but arrays, and nothing else is started."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.core.errors import TesseraError
from pipelines.data.importers.support.unpickle_guard import guarded


class _Planted:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def test_unpickling_is_blocked_only_while_the_data_set_is_read(tmp_path: Path) -> None:
    planted = pickle.dumps(_Planted(tmp_path / "marker"))
    array = pickle.dumps(np.arange(3), 2)
    server = socket.create_server(("127.0.0.1", 0))
    with guarded("the set"):
        np.testing.assert_array_equal(pickle.loads(array), np.arange(3))
        with pytest.raises(TesseraError, match=r"^the set has a pickle that loads \w+\.open"):
            pickle.loads(planted)
        with guarded("inner"), pytest.raises(TesseraError, match=r"^inner"):
            pickle.loads(planted)
        with pytest.raises(TesseraError, match=r"^the set would do subprocess\.Popen"):
            subprocess.run([sys.executable, "-c", ""])
        with pytest.raises(TesseraError, match=r"^the set would do socket\.connect"):
            socket.create_connection(server.getsockname())
    assert not (tmp_path / "marker").exists()
    subprocess.run([sys.executable, "-c", ""], check=True)
    socket.create_connection(server.getsockname()).close()
    server.close()
    pickle.loads(planted).close()
    assert (tmp_path / "marker").exists()
