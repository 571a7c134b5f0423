"""The error of a sample, which goes to other processes with all it says."""

from __future__ import annotations

import pickle

from pipelines.data.sample_error import SampleError


def test_it_is_the_same_in_another_process() -> None:
    error = SampleError("box without area", "a.jpg, object 2", hint="drop it", of_object=True)
    copy = pickle.loads(pickle.dumps(error))
    assert vars(copy) == vars(error)
    assert str(copy) == "a.jpg, object 2. drop it"
