#!/bin/sh
# Makes the secrets of docker-compose.yml that don't exist yet, one file each, in the folder `secrets`
# at the project's root, which git and the images ignore. Existing files stay as they are.
set -eu
cd "$(dirname "$0")/../.."
mkdir -p secrets
chmod 700 secrets
for name in postgres_password object_store_access_key object_store_secret_key mlflow_flask_key \
  mlflow_admin_password mlflow_trainer_password ray_auth_token; do
  [ -s "secrets/$name" ] && continue
  od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "secrets/$name"
  # The folder keeps others out; in a container the file belongs to another user than its reader.
  chmod 444 "secrets/$name"
done
