#!/bin/sh
# Before the server starts: its tables, made or upgraded by one process alone, and the buckets. What
# isn't ready yet is tried again for a minute.
set -eu
for attempt in 1 2 3 4 5 6; do
  mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI" && break
  [ "$attempt" = 6 ] && exit 1
  sleep 10
done
# shellcheck disable=SC2086  # a list of names
python - $BUCKETS <<'PYTHON'
import os, sys, time
import boto3
from botocore.exceptions import BotoCoreError, ClientError

store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
for attempt in range(7):
    try:
        there = [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]
        for name in sys.argv[1:]:
            if name not in there:
                store.create_bucket(Bucket=name)
        break
    except (BotoCoreError, ClientError):
        if attempt == 6:
            raise
        time.sleep(10)
PYTHON
