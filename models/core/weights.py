"""Pretrained weights from a file or an address that the user names.

In: a path or URL of a `.safetensors` file, or of a PyTorch state dict (`.pth`, `.pt`). Out: tensors
by name, and a network that has them. The one place below `models` that reads anything from
outside; it keeps no copy on disk. A state dict is read with `weights_only=True`: nothing in it is
executed.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import urllib.parse
import urllib.request
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from models.core.errors import TesseraError, UsageError

LIMIT_BYTES = 8 * 2**30
TIMEOUT_SECONDS = 60
SUFFIXES = (".safetensors", ".pth", ".pt")


def read_weights(source: str, sha256: str = "") -> dict[str, Tensor]:
    """The tensors in `source`, on the CPU. `sha256` (64 hex digits) is compared where it is given.

    Raises TesseraError when there is nothing, when it is damaged or not what `sha256` says.
    """
    address = urllib.parse.urlsplit(source)
    suffix = Path(address.path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"weights {source!r}: {suffix or 'no suffix'} is not known",
            hint=f"name a file that ends in {', '.join(SUFFIXES)}",
        )
    content = _read(source, address.scheme)
    digest = hashlib.sha256(content).hexdigest()
    if sha256 and digest != sha256.lower():
        raise TesseraError(
            f"weights {source!r} have the sha256 {digest}, not {sha256}",
            hint="fetch them again, or correct model.weights_sha256",
        )
    tensors = _safetensors(content, source) if suffix == ".safetensors" else _state(content, source)
    broken = [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise TesseraError(f"weights {source!r} are not finite in {_listed(broken)}")
    return tensors


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], head: str, source: str
) -> list[str]:
    """Puts `tensors` into `module`. Gives the names of the parameters that stay fresh: those below
    `head`, when one of them is missing or of another shape. Any other difference is a TesseraError
    that names it."""
    own = module.state_dict()
    heads = [name for name in own if name.startswith(f"{head}.")]
    fits = all(name in tensors and tensors[name].shape == own[name].shape for name in heads)
    fresh = [] if fits else heads
    given = {n: t for n, t in tensors.items() if fits or not n.startswith(f"{head}.")}
    counters = {n for n in own if n.endswith("num_batches_tracked")}  # old files have none
    missing = [n for n in own if n not in given and n not in counters and n not in fresh]
    extra = [n for n in given if n not in own]
    shapes = [
        f"{n} {tuple(given[n].shape)} for {tuple(own[n].shape)}"
        for n in own
        if n in given and given[n].shape != own[n].shape
    ]
    reasons = {"missing": missing, "not in the network": extra, "of another shape": shapes}
    found = "; ".join(f"{reason}: {_listed(names)}" for reason, names in reasons.items() if names)
    if found:
        raise TesseraError(
            f"weights {source!r} are of another network: {found}",
            hint="take the variant and the model settings that they were made with",
        )
    module.load_state_dict(dict(given), strict=False)
    return fresh


def _read(source: str, scheme: str) -> bytes:
    try:
        if scheme in ("http", "https", "file"):
            with urllib.request.urlopen(source, timeout=TIMEOUT_SECONDS) as reply:
                content = _read_stream(reply)
                promised = reply.headers.get("Content-Length")
        elif len(scheme) > 1:
            raise UsageError(
                f"weights {source!r}: {scheme}:// is not known",
                hint="give a path, or an address with http, https or file",
            )
        else:
            with Path(source).open("rb") as file:
                content, promised = _read_stream(file), None
    except (OSError, http.client.HTTPException) as error:
        raise TesseraError(f"weights {source!r} can't be read: {error}") from None
    if len(content) > LIMIT_BYTES:
        raise TesseraError(f"weights {source!r} are larger than {LIMIT_BYTES} bytes")
    if promised is not None and int(promised) != len(content):
        raise TesseraError(
            f"weights {source!r}: {len(content)} of {promised} bytes came", hint="try again"
        )
    return content


def _read_stream(stream: IO[bytes]) -> bytes:
    """All of it, or one piece more than the limit; piece by piece, since `read(n)` allocates n."""
    content = io.BytesIO()
    while content.tell() <= LIMIT_BYTES and (piece := stream.read(2**20)):
        content.write(piece)
    return content.getvalue()


def _safetensors(content: bytes, source: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(content))
    except SafetensorError as error:
        raise TesseraError(f"weights {source!r} are damaged: {error}") from None


def _state(content: bytes, source: str) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # the answer is tensors or our error
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise nearly everything
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TesseraError(
            f"weights {source!r} are damaged, or hold more than weights: {line}",
            hint="only a plain state dict is read; nothing in it is executed",
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise TesseraError(f"weights {source!r} hold no state dict: a name -> tensor for each")
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
