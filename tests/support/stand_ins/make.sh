#!/bin/sh
# make.sh FOLDER: podman images for docker-compose.yml, out of Debian's packages, where no registry of
# images can be reached. Needs root, podman and debootstrap, and 3 GB in FOLDER.
#
# Python's and PostgreSQL's images have what the official ones have under the same paths. The object
# store is Ceph's radosgw instead of SeaweedFS: it has the same address, keys and health check.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
image() {
  sed -n "s/^ *.*\${$1:-\([^}]*\)}.*/\1/p" "$here/../../../docker-compose.yml" | head -n 1
}
python=docker.io/library/$(image PYTHON_IMAGE)
podman image exists "$python" || {
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv \
    bookworm "$folder/python"
  rm -f "$folder"/python/usr/lib/python3*/EXTERNALLY-MANAGED  # as in the official image
  ln -sf python3 "$folder/python/usr/bin/python"
  tar -C "$folder/python" -c . | podman import - "$python"
}
for target in postgres object-store; do
  case $target in
    postgres) name=docker.io/library/$(image POSTGRES_IMAGE) ;;
    *) name=docker.io/$(image OBJECT_STORE_IMAGE) ;;
  esac
  podman build --network host --build-arg PYTHON_IMAGE="$python" --target "$target" \
    --tag "$name" "$here"
done
