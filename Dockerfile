# `aiotrt serve`, for models in /models; "Container" in docs/serving.md shows how to build and run it.
ARG PYTHON=3.13

FROM python:${PYTHON} AS build
ARG EXTRAS=grpc,onnx,serving,uvloop
ARG TORCH_INDEX=
WORKDIR /src
COPY . .
RUN python -m venv /opt/aiotrt \
    && AIOTRT_BUILD=native PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" /opt/aiotrt/bin/python -m pip install --no-cache-dir ".[${EXTRAS}]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/aiotrt /opt/aiotrt
RUN useradd --system --uid 10001 --user-group aiotrt && install -d -m 0700 -o aiotrt -g aiotrt /var/cache/aiotrt
ENV PATH=/opt/aiotrt/bin:$PATH AIOTRT_CACHE_DIR=/var/cache/aiotrt
USER 10001
EXPOSE 8000
# SIGTERM, which `docker stop` sends, drains. Give it longer than --drain-timeout: docker stop --time 40.
HEALTHCHECK --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=5)"]
ENTRYPOINT ["aiotrt", "serve", "--host", "0.0.0.0"]
