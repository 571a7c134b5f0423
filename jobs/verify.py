"""`tessera verify`: checks every checksum of a packed data set."""

from __future__ import annotations

import sys
import time

import click

from jobs.cli import run
from jobs.shared.terminal import show_facts, show_json

GROUP = "data"


@click.command(short_help="Check every byte of a packed data set.")
@click.argument("where", metavar="DIR")
@click.option("--workers", type=click.IntRange(1), help="Threads; by default one for each CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
def command(where: str, workers: int | None, as_json: bool, verbose: bool) -> int:
    """Check every byte of a packed data set: the folder or address DIR.

    Each index, each shard and each sample is compared with its checksum. Differences are listed,
    and the exit status is then 1. A remote data set is downloaded for the check and not kept.
    """
    del verbose
    from pipelines.data.inspection import verify

    started = time.monotonic()
    is_terminal = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if is_terminal:
            rate = done / 1e9 / max(time.monotonic() - started, 1e-9)
            line = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB  {rate:.2f} GB/s"
            click.echo(f"\r\x1b[K{line}", nl=False, err=True)

    try:
        report = verify.verify(where, workers=workers or 0, progress=show)
    finally:
        if is_terminal:
            click.echo("\r\x1b[K", nl=False, err=True)
    seconds = max(time.monotonic() - started, 1e-9)
    if as_json:
        show_json(
            {
                "same": not report.differences,
                "shards": report.shards,
                "samples": report.samples,
                "bytes": report.size_bytes,
                "seconds": round(seconds, 3),
                "differences": list(report.differences),
            }
        )
        return 1 if report.differences else 0
    for line in report.differences:
        click.echo(f"differs: {line}")
    megabytes = report.size_bytes / 1e6
    facts = {
        "checked": f"{report.samples:,} samples in {report.shards:,} shards",
        "read": f"{megabytes:,.1f} MB in {seconds:.2f} s, {megabytes / seconds:,.0f} MB/s",
        "differs": f"{len(report.differences)}" if report.differences else "nothing",
    }
    if report.differences:
        facts["next"] = "fetch these shards again, or pack the data set again"
    show_facts(facts)
    return 1 if report.differences else 0


if __name__ == "__main__":
    run(command, "tessera verify")
