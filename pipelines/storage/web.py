"""What all requests to web servers are sent with.

In: how redirects are followed. Out: an opener of urllib. Must not know what is requested.
"""

from __future__ import annotations

import urllib.request


def opener(redirects: type[urllib.request.HTTPRedirectHandler]) -> urllib.request.OpenerDirector:
    """An opener without handlers for ftp, file and data, to which a server could redirect."""
    made = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        redirects,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.UnknownHandler,
    ):
        made.add_handler(handler())
    return made
