"""What MLflow refuses, as an error that a user can act on."""

from __future__ import annotations

import pytest

from pipelines.tracking.mlflow_errors import RefusedError, explain_refusal


@pytest.mark.slow
@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAUTHENTICATED"])
def test_a_refusal_says_what_was_asked_for(code: str) -> None:
    from mlflow.exceptions import MlflowException

    refused = pytest.raises(RefusedError, match=r"MLflow refuses the model 'm'.*nobody may")
    with refused as caught, explain_refusal("the model 'm'"):
        raise MlflowException("nobody may", error_code=getattr(_codes(), code))
    assert "log in" in caught.value.hint


@pytest.mark.slow
def test_other_errors_stay_what_they_are() -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match="gone"), explain_refusal("the model 'm'"):
        raise MlflowException("gone", error_code=_codes().RESOURCE_DOES_NOT_EXIST)


def _codes() -> object:
    from mlflow.protos import databricks_pb2

    return databricks_pb2
