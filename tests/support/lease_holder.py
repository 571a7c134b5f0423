"""A process that asks for leases, for tests: `python lease_holder.py ADDRESS TTL_SECONDS`.

Reads a word and a name a line, and answers each with a line of JSON:
    try NAME      asks for the lease NAME once, and holds it: {"attempt": …} or {"refused": …}
    wait NAME     the same, but watches a holder that shows no sign of life
    write NAME    writes the file NAME, if the lease is still held: {"written": …} or {"lost": …}
    release NAME  releases the lease
`clock SECONDS` sets this process's clock forward.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack

from models.core.errors import TesseraError
from pipelines.storage import lease
from pipelines.storage.open import open_storage


def main(address: str, ttl_seconds: float) -> None:
    storage = open_storage(address, policy=lease.REQUESTS)
    held = ExitStack()
    current: lease.Lease | None = None
    _answer(ready=True)
    for line in sys.stdin:
        word, name = line.split()
        try:
            if word in ("try", "wait"):
                current = held.enter_context(
                    lease.held(
                        storage,
                        name,
                        name,
                        holder=lease.Holder.this_process(),
                        patience_seconds=60 if word == "wait" else 0,
                        ttl_seconds=ttl_seconds,
                    )
                )
                _answer(attempt=current.attempt)
            elif word == "write":
                assert current is not None
                current.check()
                storage.write(name, b"x")
                _answer(written=name)
            elif word == "release":
                held.close()
                _answer(released=name)
            else:
                ahead, real = float(name), time.time
                time.time = lambda: real() + ahead  # noqa: B023 - set once
                _answer(clock=name)
        except lease.LeaseLostError as error:
            _answer(lost=str(error))
        except TesseraError as error:
            _answer(refused=str(error))


def _answer(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
