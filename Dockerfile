# syntax=docker/dockerfile:1
# Build:  docker build -t freetumor .
# Run:    docker run --gpus all -p 8080:8080 -v /data/store:/store:ro -v /data/models:/models:ro \
#           -e FREETUMOR__SERVER__READ_KEYS="$(cat read.key)" -e 'FREETUMOR__SERVER__ALLOWED_HOSTS=["gpu-node-1"]' freetumor
# Without a read key it does not start, unless FREETUMOR__SERVER__ALLOW_ANONYMOUS=true (docs/service.md).
# Clients that bring no key must call it by a name of ALLOWED_HOSTS; any other Host is refused (421).

FROM rust:1.95-bookworm AS build
WORKDIR /src
# Dependencies first: they take 17 minutes on two cores and change seldom.
COPY Cargo.toml Cargo.lock build.rs ./
COPY vendor vendor
COPY proto proto
COPY benches benches
RUN mkdir -p src && echo 'fn main() {}' > src/main.rs && touch src/lib.rs \
 && cargo build --release --locked --features cuda --bin freetumor && rm -rf src
COPY src src
COPY assets assets
COPY configs configs
RUN touch src/main.rs src/lib.rs && cargo build --release --locked --features cuda --bin freetumor \
 && strip target/release/freetumor

# CubeCL compiles kernels at run time: it needs NVRTC and the CUDA headers, not the compiler.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
RUN apt-get update \
 && apt-get install -y --no-install-recommends cuda-nvrtc-13-0 cuda-cudart-dev-13-0 cuda-cccl-13-0 cuda-crt-13-0 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 freetumor && mkdir /store /models /cache && chown freetumor /cache
ENV CUDA_PATH=/usr/local/cuda XDG_CACHE_HOME=/cache
COPY --from=build /src/target/release/freetumor /usr/local/bin/freetumor
COPY configs /etc/freetumor
USER freetumor
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["freetumor", "healthcheck"]
ENTRYPOINT ["freetumor"]
CMD ["serve", "--config", "/etc/freetumor/abdomen.toml", "--store", "/store", "--models", "/models", "--bind", "0.0.0.0:8080"]
