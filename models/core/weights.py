"""Pretrained weights from a file or URL that the user names.

In: a path or URL of a `.safetensors` file, or of a PyTorch state dict (`.pth`, `.pt`). Out: tensors
by name, and a network with them. The only module below `models` that reads from outside; it keeps
no copy on disk. State dicts are read with `weights_only=True`, so no code in them is executed.
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
    """The tensors in `source`, on the CPU.

    Raises TesseraError if it can't be read, is damaged, contains values that are not finite, or if
    its SHA-256 is not `sha256` (64 hex digits; empty: not checked).
    """
    address = urllib.parse.urlsplit(source)
    suffix = Path(address.path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"weights {source!r}: {suffix or 'no suffix'} is not supported",
            hint=f"name a file that ends in {', '.join(SUFFIXES)}",
        )
    content = _read(source, address.scheme)
    digest = hashlib.sha256(content).hexdigest()
    if sha256 and digest != sha256.lower():
        raise TesseraError(
            f"weights {source!r} have the sha256 {digest}, not {sha256}",
            hint="download them again, or correct model.weights_sha256",
        )
    tensors = _safetensors(content, source) if suffix == ".safetensors" else _state(content, source)
    broken = [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise TesseraError(
            f"weights {source!r} have values that are not finite in {_listed(broken)}"
        )
    return tensors


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], head: str, source: str
) -> list[str]:
    """Loads `tensors` into `module`. Returns the names of the parameters that stay new: those below
    `head`, if one of them is missing or has another shape. Raises TesseraError for any other
    difference, and names it."""
    own = module.state_dict()
    heads = [name for name in own if name.startswith(f"{head}.")]
    fits = all(name in tensors and tensors[name].shape == own[name].shape for name in heads)
    fresh = [] if fits else heads
    loaded = {n: t for n, t in tensors.items() if fits or not n.startswith(f"{head}.")}
    counters = {n for n in own if n.endswith("num_batches_tracked")}  # older files lack them
    missing = [n for n in own if n not in loaded and n not in counters and n not in fresh]
    extra = [n for n in loaded if n not in own]
    shapes = [
        f"{n} {tuple(loaded[n].shape)} for {tuple(own[n].shape)}"
        for n in own
        if n in loaded and loaded[n].shape != own[n].shape
    ]
    reasons = {"missing": missing, "not in the network": extra, "of another shape": shapes}
    different = "; ".join(
        f"{reason}: {_listed(names)}" for reason, names in reasons.items() if names
    )
    if different:
        raise TesseraError(
            f"weights {source!r} are of another network: {different}",
            hint="use the variant and the model settings that they were trained with",
        )
    module.load_state_dict(dict(loaded), strict=False)
    return fresh


def _read(source: str, scheme: str) -> bytes:
    try:
        if scheme in ("http", "https", "file"):
            with urllib.request.urlopen(source, timeout=TIMEOUT_SECONDS) as reply:
                content = _read_stream(reply)
                promised = reply.headers.get("Content-Length")
        elif len(scheme) > 1:
            raise UsageError(
                f"weights {source!r}: {scheme}:// is not supported",
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
            f"weights {source!r}: received {len(content)} of {promised} bytes", hint="try again"
        )
    return content


def _read_stream(stream: IO[bytes]) -> bytes:
    """All bytes, or one chunk more than the limit. In chunks, because `read(n)` allocates n
    bytes."""
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
        with warnings.catch_warnings(action="ignore"):  # the result is tensors or our error
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise nearly any exception
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TesseraError(
            f"weights {source!r} are damaged, or contain more than weights: {line}",
            hint="only plain state dicts are read; code in them is never executed",
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise TesseraError(
            f"weights {source!r} are not a state dict: a mapping of names to tensors"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
