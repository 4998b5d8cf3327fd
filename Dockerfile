# qcompress as a program: docker run --rm -v "$PWD:/models" qcompress quantize model.safetensors --bits 2
#
# On x86 the usual torch brings CUDA along. For a small image give the index of torch's CPU wheels:
#   docker build --build-arg TORCH_INDEX=... -t qcompress .
FROM python:3.11-slim

ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

WORKDIR /opt/qcompress
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY qcompress qcompress
RUN if [ -n "$TORCH_INDEX" ]; then pip install --index-url "$TORCH_INDEX" -c constraints.txt torch; fi \
    && pip install -c constraints.txt . \
    && useradd --create-home qcompress

USER qcompress
WORKDIR /models
ENTRYPOINT ["qcompress"]
CMD ["--help"]
