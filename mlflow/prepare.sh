#!/bin/sh
# Before the server starts: its tables, made or upgraded by one process alone, and its bucket.
set -eu
mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"
python - "$ARTIFACT_BUCKET" <<'PYTHON'
import os, sys
import boto3

store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
if sys.argv[1] not in [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]:
    store.create_bucket(Bucket=sys.argv[1])
PYTHON
