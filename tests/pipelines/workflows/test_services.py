"""A link is printed with a note if its server can't be reached."""

from __future__ import annotations

import socket

from pipelines.workflows import services


def test_a_link_has_a_warning_if_the_server_does_not_respond() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        link = f"http://127.0.0.1:{held.getsockname()[1]}/#/experiments/1"
        assert services.page(link) == f"{link} (once `tessera up` runs)"
        held.listen()
        assert services.page(link) == link
    assert services.page("https://name.invalid/x") == ("https://name.invalid/x (not reachable now)")
