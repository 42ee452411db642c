# docker build --build-arg FAST_SPATIAL_COMMIT="$(git rev-parse HEAD)" -t fast_spatial .
#
# BASE=cuda: the smallest CUDA image. torch's wheels contain CUDA's libraries, in the same version.
# BASE=apex: NVIDIA's PyTorch image, with apex for --optimizer apex. Only missing packages are installed.
ARG BASE=cuda

FROM nvidia/cuda:13.0.3-base-ubuntu24.04 AS cuda
# Triton and torch.compile need a compiler and Python's headers at run time. The distribution keeps no old versions to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libpython3-dev python3 \
    && rm -rf /var/lib/apt/lists/*

FROM nvcr.io/nvidia/pytorch:26.09-py3 AS apex

FROM ${BASE} AS packages
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /tmp/packages
COPY pyproject.toml requirements.txt ./
# Keep the image's torch, and NumPy, against which it was built. Install missing packages in our pinned versions.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --system-site-packages /opt/venv \
    && /opt/venv/bin/pip list --format=freeze >present.txt \
    && awk -F== 'NR == FNR { present[tolower($1)]; if ($1 ~ /^(numpy|torch|torchvision|triton)$/) print; next } \
        !(tolower($1) in present)' present.txt requirements.txt >constraints.txt \
    && python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        >dependencies.txt \
    && PIP_CONSTRAINT=constraints.txt /opt/venv/bin/pip install --requirement dependencies.txt \
    && /opt/venv/bin/pip uninstall --yes pip

FROM ${BASE}
COPY --from=packages /opt/venv /opt/venv
# Writable for any `--user`, which has neither a name nor a home in the image. A volume at /cache keeps compiled kernels.
# Not filled at build time: numba compiles for the CPU it runs on. kernels/host.py names its folder by the sources' hash.
RUN mkdir --mode=1777 /cache
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
WORKDIR /opt/fast_spatial
# Readable by all users, independent of the umask at checkout.
COPY --chmod=755 . .
ARG FAST_SPATIAL_COMMIT=""
ENV FAST_SPATIAL_COMMIT=$FAST_SPATIAL_COMMIT
USER 1000:1000
ENTRYPOINT ["python3"]
CMD ["launch.py", "--help"]
