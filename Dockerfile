# syntax=docker/dockerfile:1

# tombola in a container. It runs as an unprivileged user and keeps its data in the volume /data.
#
#   docker build --tag tombola .
#   docker run --rm --publish 127.0.0.1:8000:8000 --volume tombola:/data \
#     --volume ./config.toml:/etc/tombola/config.toml:ro tombola
#
# In a container the server listens on all addresses, so it starts only if authentication is configured.
# `docker run --rm tombola token new --name NAME --scope draw` prints a token and its entry. If the port is
# published only on this machine, mode = "none" under [auth] is enough; to try it, pass
# --env TOMBOLA_AUTH__MODE=none.
#
# For a fleet, add --build-arg FEATURES=etcd, FEATURES=postgres, or FEATURES=etcd,postgres.
#
# To use programs that are already compiled, for example those in target/release, name their folder. The C
# library of the base image must be at least as new as the one that they were compiled with:
#
#   docker build --tag tombola --build-arg PROGRAMS=prebuilt --build-context programs=target/release .

ARG RUST_VERSION=1.95.0
ARG DEBIAN_RELEASE=bookworm
# The image to compile in, and the base of the result.
ARG BUILD_IMAGE=rust:${RUST_VERSION}-slim-${DEBIAN_RELEASE}
ARG BASE_IMAGE=debian:${DEBIAN_RELEASE}-slim
# The stage that supplies the programs: build compiles them, prebuilt copies them. The default is in FROM, because
# buildah before 1.29 ignores the defaults of arguments when it searches for a stage.
ARG PROGRAMS

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
ARG FEATURES=""
# The etcd client is generated from protocol files at build time.
RUN case ",${FEATURES}," in *,etcd,*) \
        apt-get update \
        && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev \
        && rm -rf /var/lib/apt/lists/* ;; \
    esac
# The bundled SQLite is compiled with the C compiler of the base image.
COPY .cargo/ .cargo/
COPY Cargo.toml Cargo.lock config.toml README.md ./
COPY src/ src/
COPY tools/ tools/
COPY benches/ benches/
COPY docs/clients/ docs/clients/
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --features "${FEATURES}" --bin tombola --bin init-shards \
    && install -D -m 755 -t /out/usr/local/bin target/release/tombola target/release/init-shards

FROM ${BASE_IMAGE} AS prebuilt
COPY --from=programs --chmod=755 tombola init-shards /out/usr/local/bin/

FROM ${PROGRAMS:-build} AS files
RUN install -d -m 755 /out/etc/tombola \
    && install -d -m 700 -o 10001 -g 10001 /out/data

FROM ${BASE_IMAGE}
COPY --from=files /out/ /
COPY LICENSE /usr/share/doc/tombola/
# With a numeric user, Kubernetes can check that it is not root (runAsNonRoot).
USER 10001:10001
# The server reads /etc/tombola/config.toml from here, and writes nothing here.
WORKDIR /etc/tombola
ENV TOMBOLA_SERVER__LISTEN=0.0.0.0:8000 \
    TOMBOLA_STORAGE__DIR=/data
VOLUME /data
EXPOSE 8000
# On SIGTERM, the server returns its leases, so no numbers are burned. This takes up to server.drain_ms, 10 s,
# which is also how long `docker stop` waits: run the container with --stop-timeout 30.
STOPSIGNAL SIGTERM
# Checks whether to send requests here, like /ready: a used-up pool does not make the container unhealthy. On an
# empty volume, the first number is available within 2 seconds. With server.tls, add --url https://NAME:8000 with
# the name in the certificate, and --ca.
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 \
    CMD ["tombola", "health"]
ENTRYPOINT ["tombola"]
CMD ["serve"]
