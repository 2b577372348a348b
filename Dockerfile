# One image for all functions: `docker build -t gpubroker .`, the same with Podman or Buildah.
# It runs with a read-only root and as a user that owns nothing.
ARG PYTHON=python:3.12-slim-bookworm

FROM ${PYTHON} AS build
COPY requirements-image.lock /tmp/
RUN python -m pip install --disable-pip-version-check --no-cache-dir --no-compile --require-hashes \
        --target /app/site -r /tmp/requirements-image.lock
# Bytecode that asks for no source: the functions start three times faster with it, and none could be written later.
# Of the Kubernetes client, the half that nobody uses is left out: it is a fifth of the image.
RUN rm -rf /app/site/bin /app/site/kubernetes/aio && find /app -depth -type d -name tests -exec rm -rf {} + \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash /app
COPY lib/gpubroker /app/code/gpubroker
COPY functions /app/code/gpubroker/bundle/functions
COPY eventing /app/code/gpubroker/bundle/eventing
COPY docs/errors.md /app/code/gpubroker/bundle/docs/
RUN python -m compileall -q -j 0 --invalidation-mode unchecked-hash /app/code

FROM ${PYTHON}
# pip is the only tool there is to build with; the slim images have no bytecode of the standard library.
RUN rm -rf /usr/local/lib/python3.*/site-packages/* /usr/local/lib/python3.*/ensurepip /usr/local/bin/pip* \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
COPY --from=build /app/site /app/site
COPY --from=build /app/code /app/code
ENV PYTHONPATH=/app/code:/app/site PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["python", "-m", "gpubroker"]
CMD ["--help"]
