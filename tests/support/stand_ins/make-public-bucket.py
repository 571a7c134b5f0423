"""make-public-bucket.py NAME: makes a bucket that everybody may list, on the S3 server of this
container, with Python alone."""

import datetime
import hashlib
import hmac
import http.client
import os
import sys

HOST, REGION = "127.0.0.1:8333", "us-east-1"
EMPTY = hashlib.sha256(b"").hexdigest()

path = f"/{sys.argv[1]}/"
now = datetime.datetime.now(datetime.UTC)
moment, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
headers = {
    "host": HOST,
    "x-amz-acl": "public-read",
    "x-amz-content-sha256": EMPTY,
    "x-amz-date": moment,
}
signed = ";".join(sorted(headers))
request = "\n".join(
    ["PUT", path, "", *(f"{name}:{headers[name]}" for name in sorted(headers)), "", signed, EMPTY]
)
scope = f"{day}/{REGION}/s3/aws4_request"
digest = hashlib.sha256(request.encode()).hexdigest()
key = b"AWS4" + os.environb[b"AWS_SECRET_ACCESS_KEY"]
for part in scope.split("/"):
    key = hmac.new(key, part.encode(), hashlib.sha256).digest()
text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"
signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
headers["Authorization"] = (
    f"AWS4-HMAC-SHA256 Credential={os.environ['AWS_ACCESS_KEY_ID']}/{scope}, "
    f"SignedHeaders={signed}, Signature={signature}"
)
connection = http.client.HTTPConnection(HOST)
connection.request("PUT", path, headers=headers)
response = connection.getresponse()
sys.exit(0 if response.status == 200 else f"{response.status}: {response.read()!r}")
