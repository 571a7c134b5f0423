#!/bin/bash
# postgres.sh postgres OPTION…: as the official image, makes the database on the first start, with a
# server that answers on the socket alone, runs the SQL files, and then serves TCP.
set -e
cluster=$PGDATA/cluster
if [ ! -s "$cluster/PG_VERSION" ]; then
  [ -s "$POSTGRES_PASSWORD_FILE" ] || { echo "superuser password is not specified" >&2; exit 1; }
  initdb --pgdata "$cluster" --username "$POSTGRES_USER" --encoding=UTF8 --locale=C.UTF-8 \
    --auth-host=scram-sha-256 --auth-local=trust --pwfile="$POSTGRES_PASSWORD_FILE" > /dev/null
  echo "host all all all scram-sha-256" >> "$cluster/pg_hba.conf"
  pg_ctl -D "$cluster" -w -o "-c listen_addresses='' -k /run/postgresql" start > /dev/null
  createdb -h /run/postgresql -U "$POSTGRES_USER" "$POSTGRES_DB"
  for file in /docker-entrypoint-initdb.d/*.sql; do
    psql -v ON_ERROR_STOP=1 -h /run/postgresql -U "$POSTGRES_USER" -d "$POSTGRES_DB" -f "$file"
  done
  pg_ctl -D "$cluster" -m fast -w stop > /dev/null
fi
shift
exec postgres -D "$cluster" -c listen_addresses='*' -k /run/postgresql "$@"
