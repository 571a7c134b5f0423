# Ray's head and workers: this project with its pinned dependencies. Build context: the project's root.
FROM python:3.11-slim-bookworm
WORKDIR /srv/tessera
COPY requirements.lock .
RUN pip install --no-cache-dir --requirement requirements.lock
COPY pyproject.toml README.md LICENSE tessera.py ./
COPY models models
COPY pipelines pipelines
COPY jobs jobs
RUN pip install --no-cache-dir --no-deps .
# A new volume takes over this folder's owner.
RUN useradd --create-home tessera && mkdir /data && chown tessera /data
USER tessera
WORKDIR /data
ENV TESSERA_HOME=/data/tessera \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_PYTHON_REFRESH=quiet
