# syntax=docker/dockerfile:1

# tombola in a container, as a user without rights, numbers in the volume /data.
#
#   docker build --tag tombola .
#   docker run --rm --publish 127.0.0.1:8000:8000 --volume tombola:/data \
#     --volume ./config.toml:/etc/tombola/config.toml:ro tombola
#
# For a fleet that agrees in etcd or PostgreSQL: docker build --build-arg FEATURES=etcd,postgres
#
# In a container the server has to listen on all addresses, so that it starts only when the settings
# say who may ask: tokens, as `docker run --rm tombola token new --name NAME --scope draw` prints them,
# or, where the port is published for this machine alone, mode = "none" under [auth]. For a first try
# that is --env TOMBOLA_AUTH__MODE=none.
#
# For a fleet add --build-arg FEATURES=etcd or FEATURES=postgres, or both with a comma.

ARG RUST_VERSION=1.95.0
ARG DEBIAN_RELEASE=bookworm

FROM rust:${RUST_VERSION}-slim-${DEBIAN_RELEASE} AS build
WORKDIR /src
ARG FEATURES=""
# The client of etcd is made from its protocol's files.
RUN case ",${FEATURES}," in *,etcd,*) \
        apt-get update \
        && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev \
        && rm -rf /var/lib/apt/lists/* ;; \
    esac
# The bundled SQLite needs the C compiler that is in the image.
COPY .cargo/ .cargo/
COPY Cargo.toml Cargo.lock config.toml README.md ./
COPY src/ src/
COPY tools/ tools/
COPY benches/ benches/
COPY docs/clients/ docs/clients/
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --features "${FEATURES}" --bin tombola --bin init-shards \
    && install -D -m 755 -t /out/usr/local/bin target/release/tombola target/release/init-shards \
    && install -d -m 755 /out/etc/tombola \
    && install -d -m 700 -o 10001 -g 10001 /out/data

FROM debian:${DEBIAN_RELEASE}-slim
COPY --from=build /out/ /
COPY LICENSE /usr/share/doc/tombola/
# A number, so that Kubernetes can tell that it is not root (runAsNonRoot).
USER 10001:10001
# /etc/tombola/config.toml is found from here; nothing is written.
WORKDIR /etc/tombola
ENV TOMBOLA_SERVER__LISTEN=0.0.0.0:8000 \
    TOMBOLA_STORAGE__DIR=/data
VOLUME /data
EXPOSE 8000
# As the server hears it: leases go back, so that nothing is burned. It takes up to server.drain_ms,
# 10 s, which is all that `docker stop` waits for: give it --stop-timeout 30.
STOPSIGNAL SIGTERM
# On an empty volume the first answer comes within 2 seconds. With server.tls the command needs
# --url https://NAME:8000, as the certificate has it, and --ca.
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s --retries=3 \
    CMD ["tombola", "health"]
ENTRYPOINT ["tombola"]
CMD ["serve"]
