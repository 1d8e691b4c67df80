# The service and all of its commands. Build: scripts/image (or any builder of Dockerfiles).
#
# Two stages: what builds stays in the first. Nothing is fetched but what the locks in requirements/ name by hash.
# The same SOURCE_DATE_EPOCH gives the same files; a builder that also sets the times of layers by it (scripts/image
# says how) gives the same layers.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
ARG SOURCE_DATE_EPOCH=0
# One seed for hashes: byte code must not depend on it. Index and CA are the builder's own settings.
ENV SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} PYTHONHASHSEED=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements/build.txt requirements/image.txt requirements/
RUN python -m venv /build && python -m venv --without-pip /opt/progressdb-kms \
    && /build/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/build.txt \
    && /build/bin/python -m pip --python /opt/progressdb-kms/bin/python install --quiet --no-compile --no-deps \
        --only-binary :all: --require-hashes -r requirements/image.txt
COPY pyproject.toml README.md LICENSE ./
COPY service service
RUN /build/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheel . \
    && /build/bin/python -m pip --python /opt/progressdb-kms/bin/python install --quiet --no-compile --no-deps \
        --no-index /wheel/*.whl \
    && /build/bin/python -m pip --python /opt/progressdb-kms/bin/python check
# Byte code is made here, since the root is read-only later, and checked against no clock: files of a layer have
# whatever time its builder gave them. Of the Kubernetes client, which is larger than all the rest, only the byte
# code stays, and not its second form (aio); of the AWS client, the descriptions of the services that are called.
RUN cd /opt/progressdb-kms/lib/python3*/site-packages \
    && rm -rf kubernetes/aio \
    && /opt/progressdb-kms/bin/python -m compileall -q -b --invalidation-mode unchecked-hash "$PWD/kubernetes" \
    && find kubernetes -name '*.py' -delete \
    && if [ -d botocore/data ]; then find botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name s3 ! -name kms ! -name sts ! -name 'sso*' -exec rm -rf {} +; fi \
    && /opt/progressdb-kms/bin/python -m compileall -q --invalidation-mode unchecked-hash "$PWD" \
    && rm -f /opt/progressdb-kms/bin/[Aa]ctivate* \
    && find /opt/progressdb-kms -exec touch --no-dereference --date=@${SOURCE_DATE_EPOCH} {} +

FROM ${BASE}
# Nothing is installed into a running service: the base's pip goes, and what could bring it back.
RUN rm -rf /usr/bin/pip* /usr/local/bin/pip* /root/.cache \
    && find /usr/lib /usr/local/lib -depth \( -path '*-packages/pip*' -o -path '*-packages/setuptools*' \
        -o -path '*-packages/wheel*' -o -path '*-packages/pkg_resources*' -o -path '*/ensurepip*' \) -delete
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="progressdb-kms" \
    org.opencontainers.image.description="Key management service: one wrapped data key per conversation thread" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/progressdb-kms /opt/progressdb-kms
# No home and no byte code to write: the root is read-only, /tmp alone is not.
ENV PATH=/opt/progressdb-kms/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /
EXPOSE 8443 9090
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/progressdb-kms/bin/progressdb-kms"]
CMD ["serve", "--config", "/etc/progressdb-kms/config.yaml"]
