#!/bin/sh
# ray-node.sh head|worker: a node of the Ray cluster in a container.
#
# In: the files in /run/secrets; RAY_NODE_CPUS, RAY_NODE_GPUS and RAY_NODE_MEMORY_MIB, which the node
# offers. Out: the node in the foreground. Logins go into files of the home folder, where MLflow and
# the S3 client read them. They are in no variable, so no job's log or listing can show them.
set -eu
umask 077
secret() {
  if [ ! -s "/run/secrets/$1" ]; then
    echo "secret $1 is missing or empty: run deploy/docker/make-secrets.sh" >&2
    exit 1
  fi
  cat "/run/secrets/$1"
}
secret ray_auth_token > /dev/null
mkdir -p "$HOME/.mlflow" "$HOME/.aws"
password=$(secret mlflow_trainer_password)
printf '[mlflow]\nmlflow_tracking_username = trainer\nmlflow_tracking_password = %s\n' \
  "$password" > "$HOME/.mlflow/credentials"
key=$(secret object_store_access_key)
value=$(secret object_store_secret_key)
printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' \
  "$key" "$value" > "$HOME/.aws/credentials"
# Without this the client asks for BUCKET.object-store, a name that doesn't exist.
printf '[default]\nregion = us-east-1\ns3 =\n  addressing_style = path\n' > "$HOME/.aws/config"

# A node claims what its container has, not the whole machine: of the memory 60 % for work and 30 %
# for objects, in /dev/shm. The rest is for Ray's own processes.
tenth=$((RAY_NODE_MEMORY_MIB * 1024 * 1024 / 10))
set -- "$1" "--num-cpus=$RAY_NODE_CPUS" "--num-gpus=${RAY_NODE_GPUS:-0}" \
  "--object-store-memory=$((tenth * 3))" "--memory=$((tenth * 6))" --disable-usage-stats --block
role=$1
shift
case $role in
  head) exec ray start --head --port=6379 --dashboard-host=0.0.0.0 --dashboard-port=8265 "$@" ;;
  worker) exec ray start --address=ray-head:6379 "$@" ;;
  *) echo "usage: ray-node.sh head|worker" >&2; exit 2 ;;
esac
