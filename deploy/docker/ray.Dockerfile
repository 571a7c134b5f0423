# Ray's head and workers: this project and the dependencies it runs with, without those of its tests.
# Build context: the project's root.
#
#   PYTHON_IMAGE   the base image; with @sha256:… after the tag it can't change
#   TORCH_INDEX    a package index with torch's CPU build, which saves 5 GB; empty: the usual one
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}
WORKDIR /srv/tessera
COPY requirements.lock pyproject.toml ./
ARG TORCH_INDEX=""
# The lock has the tests' tools too; as constraints it pins only what is needed to run.
RUN python -c "import tomllib; \
    print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > /tmp/runtime.txt \
    && grep -E '^torch(vision)?==' requirements.lock > /tmp/torch.txt \
    && if [ -n "$TORCH_INDEX" ]; then \
      pip install --no-cache-dir --index-url "$TORCH_INDEX" --requirement /tmp/torch.txt; fi \
    && pip install --no-cache-dir --constraint requirements.lock --requirement /tmp/runtime.txt \
    && rm /tmp/runtime.txt /tmp/torch.txt
COPY README.md LICENSE tessera.py ./
COPY models models
COPY pipelines pipelines
COPY jobs jobs
RUN pip install --no-cache-dir --no-deps .
COPY deploy/docker/ray-node.sh /usr/local/bin/ray-node.sh
# A new volume takes over the owner of this folder.
RUN useradd --create-home --uid 1000 tessera && mkdir /data && chown tessera /data
USER tessera
WORKDIR /data
ENV TESSERA_HOME=/data/tessera \
    TESSERA_CACHE=/data/cache \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    GIT_PYTHON_REFRESH=quiet \
    PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["ray-node.sh"]
