#!/bin/sh
# with-secrets.sh COMMAND…: sets NAME to the content of the file that NAME_FILE names, for each such
# variable, and becomes COMMAND. So a secret is in no command line, image or container's settings. A
# file that is missing or empty is named, and COMMAND doesn't start.
set -eu
for name in $(env | sed -n 's/^\([A-Z0-9_]*\)_FILE=\/run\/secrets\/.*/\1/p'); do
  eval "file=\$${name}_FILE"
  if [ ! -s "$file" ]; then
    echo "secret $(basename "$file") is missing or empty: run deploy/docker/make-secrets.sh" >&2
    exit 1
  fi
  export "$name=$(cat "$file")"
  unset "${name}_FILE"
done
exec "$@"
