"""Random numbers of a sample.

In: a purpose, and the sample's number in its split. Out: a generator that depends on nothing else:
neither on the sample's batch nor on its rank. Must not know what the numbers are for.
"""

from __future__ import annotations

import hashlib

import numpy as np


def sample_rng(purpose: str, number: int) -> np.random.Generator:
    """Returns the random number generator of one sample."""
    key = hashlib.blake2b(f"{purpose}\0{number}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64DXSM(int.from_bytes(key, "little")))
