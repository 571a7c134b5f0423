"""Random numbers of a sample.

In: what they are for, and the sample's number in its split. Out: a stream that depends on nothing
else, so neither on the batch that the sample is in nor on the rank that has it. Must not know what
is drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(purpose: str, number: int) -> np.random.Generator:
    """The random numbers of one sample."""
    key = hashlib.blake2b(f"{purpose}\0{number}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64DXSM(int.from_bytes(key, "little")))
