# An image for Hopper GPUs, with flash-attn and apex, which are optional.
#
#   docker build --file launch/gpu.Dockerfile --tag megalard:gpu .
#   docker run --rm --gpus all --ipc host --volume DATA:/data megalard:gpu \
#       bash launch/train.sh --model /data/MODEL --data /data/TEXT --output /data/RUN
#
# The relation kernels for Hopper GPUs run with torch 2.11 and triton 3.6. Building the two versions of
# flash-attn takes an hour or more; leave out an instruction to do without one.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git iproute2 procps python3-dev python3-venv \
    && rm --recursive /var/lib/apt/lists/*
RUN python3 -m venv /opt/python
ENV PATH=/opt/python/bin:$PATH PYTHON=/opt/python/bin/python
RUN pip install --no-cache-dir 'torch==2.11.*' packaging ninja wheel 'setuptools>=77'

ENV TORCH_CUDA_ARCH_LIST=9.0 FLASH_ATTN_CUDA_ARCHS=90 MAX_JOBS=8
RUN pip install --no-cache-dir --no-build-isolation 'flash-attn>=2.7,<3'
RUN pip install --no-cache-dir --no-build-isolation \
    'git+https://github.com/Dao-AILab/flash-attention.git@v2.8.3.post1#subdirectory=hopper'
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation \
    git+https://github.com/NVIDIA/apex.git

WORKDIR /megalard
COPY . .
RUN pip install --no-cache-dir --editable '.[dev]'
