"""ROOM: MLflow, its refusals. A server with users answers 403 for what a user may not see.

In: errors of MLflow. Out: `RefusedError`. Must not know what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from models.core.errors import TesseraError

_REFUSED = {"UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"}


def is_refusal(error: BaseException) -> bool:
    """Whether MLflow answered 401 or 403: retrying can't help."""
    return getattr(error, "error_code", "") in _REFUSED


class RefusedError(TesseraError):
    """MLflow refused the user, or doesn't say whether what it was asked for exists. MLflow answers
    403 to both where the default permission is NO_PERMISSIONS. Retrying can't help."""


@contextmanager
def explain_refusal(what: str, hint: str = "") -> Iterator[None]:
    """Raises RefusedError where MLflow answers 401 or 403; `what` was asked for, as a noun."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if not is_refusal(error):
            raise
        reason = " ".join(str(error).split())[-200:]
        raise RefusedError(
            f"MLflow refuses {what} to this user: {reason}",
            hint=hint or "log in as a user who may, or ask its owner for the permission",
        ) from error
