# The edge: Envoy's binary, and tandem-edge, which writes its configuration and follows the registry.
# docs/deployment.md has the arguments and the secrets.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS libraries
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
WORKDIR /source
COPY requirements/base.txt requirements/edge.txt requirements/
COPY deploy/images/install.sh install.sh
RUN --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle sh install.sh libraries
RUN --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle sh install.sh envoy

FROM libraries AS tandem
COPY LICENSE README.md pyproject.toml ./
COPY services/edge/tandem_edge/envoy services/edge/tandem_edge/envoy
COPY src src
COPY services services
RUN --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle sh install.sh tandem

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 tandem \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin tandem
COPY --from=libraries /opt/libraries /opt/libraries
COPY --from=tandem /opt/tandem /opt/tandem
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tandem-edge" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/tandem/bin:/opt/libraries/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TANDEM_EDGE_HOST=0.0.0.0 TANDEM_EDGE_PORT=8080
USER 10001:10001
EXPOSE 8080
# A drain takes drain_settle_s + drain_timeout_s, 30.5 s unless set: give more than that before a kill.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=3 CMD ["python3", "-m", "tandem.service.healthcheck", "edge"]
ENTRYPOINT ["tandem-edge"]
