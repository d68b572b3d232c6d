# Image with this checkout, for CPUs and NVIDIA GPUs:
#
#   docker build -t landiff .
#   docker run --rm -it --gpus all --ipc=host -v "$PWD:/work" landiff quickstart
#
# TORCH_INDEX selects the build of torch, e.g. https://download.pytorch.org/whl/cpu
FROM python:3.11-slim-bookworm
ARG TORCH_INDEX=https://pypi.org/simple
ARG EXTRAS=shots,text
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# libgl1 and libglib2.0-0: opencv-python, which the extra `text` installs. g++: torch.compile.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git libgomp1 libgl1 libglib2.0-0 g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/landiff
COPY constraints.txt ./
RUN pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple \
    -c constraints.txt torch
COPY . .
RUN pip install -c constraints.txt ".[$EXTRAS]" && landiff --version
WORKDIR /work
ENTRYPOINT ["landiff"]
CMD ["--help"]
