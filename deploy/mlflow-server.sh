#!/bin/sh
# MLflow's tracking server for several people: on PostgreSQL, artifacts through the server, nobody without a password.
#
# It needs `pip install 'mlflow[auth]' 'psycopg[binary]'`, and from the environment
#   MLFLOW_AUTH_ADMIN_PASSWORD       for the user admin, whom the first start makes; at least 12 characters
#   MLFLOW_FLASK_SERVER_SECRET_KEY   the same at every start: openssl rand -hex 32
# It takes PostgreSQL's own PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE (by default the database mlflow of the local
# cluster, by the socket) and MLflow's own settings (`mlflow server --help`), among them
#   MLFLOW_HOST, MLFLOW_PORT         127.0.0.1 and 5000 by default: put a proxy with TLS in front for other machines
#   MLFLOW_SERVER_ALLOWED_HOSTS      the names by which it is called, with and without a port:
#                                    mlflow.example.org,mlflow.example.org:*,127.0.0.1:*
#   MLFLOW_ARTIFACTS_DESTINATION     a folder, or s3://bucket/path with boto3; by default ./mlartifacts
#   MLFLOW_WORKERS                   processes, 4 by default
# See docs/sharing.md.
set -eu

refuse() {
    echo "mlflow-server.sh: $1" >&2
    exit 2
}

[ -n "${MLFLOW_AUTH_ADMIN_PASSWORD:-}" ] ||
    refuse "MLFLOW_AUTH_ADMIN_PASSWORD is not set; there is no default password: choose one of at least 12 characters"
[ ${#MLFLOW_AUTH_ADMIN_PASSWORD} -ge 12 ] ||
    refuse "MLFLOW_AUTH_ADMIN_PASSWORD is too short; choose one of at least 12 characters"
[ -n "${MLFLOW_FLASK_SERVER_SECRET_KEY:-}" ] ||
    refuse "MLFLOW_FLASK_SERVER_SECRET_KEY is not set; make one with \`openssl rand -hex 32\`, and keep it"

# Settings in the environment, not in the command line, which every user of the machine may read.
export PGDATABASE="${PGDATABASE:-mlflow}"
export MLFLOW_BACKEND_STORE_URI=postgresql:// # libpq adds the rest from PG...
MLFLOW_AUTH_CONFIG_PATH=$(cd "$(dirname "$0")" && pwd)/mlflow-auth.ini
export MLFLOW_AUTH_CONFIG_PATH
export MLFLOW_HOST="${MLFLOW_HOST:-127.0.0.1}"
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # of use to language models only
export MLFLOW_DISABLE_TELEMETRY=true

exec mlflow server --app-name basic-auth
