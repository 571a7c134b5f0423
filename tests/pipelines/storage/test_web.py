"""Requests to web servers use http and https alone."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipelines.storage import web


@pytest.mark.parametrize("address", ["file://{file}", "ftp://127.0.0.1/x", "data:text/plain,x"])
def test_other_schemes_are_refused(address: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("secret")
    opener = web.opener(urllib.request.HTTPRedirectHandler)
    with pytest.raises(urllib.error.URLError, match="unknown url type"):
        opener.open(address.format(file=file), timeout=5)
