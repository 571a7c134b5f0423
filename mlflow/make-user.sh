#!/bin/sh
# Makes the user that jobs log in as. It owns what it makes and sees nothing else. Once it exists,
# nothing changes: a new password is set with MLflow's update-password API.
set -eu
python - <<'PYTHON'
import os
from mlflow import MlflowException
from mlflow.server import get_app_client

client = get_app_client("basic-auth", os.environ["MLFLOW_TRACKING_URI"])
try:
    client.create_user(os.environ["TRAINER_USERNAME"], os.environ["TRAINER_PASSWORD"])
except MlflowException as error:
    if error.error_code != "RESOURCE_ALREADY_EXISTS":
        raise
PYTHON
