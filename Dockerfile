# The same hash-pinned packages and the same command as `make run`.
FROM python:3.13-slim AS build
WORKDIR /src
RUN python -m venv /venv
COPY requirements.lock ./
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY app app
RUN /venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && /venv/bin/pip uninstall --yes setuptools pip

FROM python:3.13-slim
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin embedgate \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/embedgate
COPY --from=build /venv /venv
COPY deploy/embedgate.toml /etc/embedgate/embedgate.toml
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    EMBEDGATE_CONFIG=/etc/embedgate/embedgate.toml \
    EMBEDGATE_SERVER__HOST=0.0.0.0 \
    EMBEDGATE_SERVER__PORT=8080 \
    EMBEDGATE_STORES__DATA_DIR=/var/lib/embedgate
VOLUME /var/lib/embedgate
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['EMBEDGATE_SERVER__PORT'] + '/healthz', timeout=2)"]
STOPSIGNAL SIGTERM
CMD ["embedgate", "serve"]
