# PostgreSQL with the binary inside: archive_command and restore_command run in
# the server's own container. Build from the root of the source tree, after the
# image of Dockerfile was tagged `highwater`.

ARG POSTGRES_MAJOR=18
# hadolint ignore=DL3006
FROM highwater AS highwater

FROM postgres:${POSTGRES_MAJOR}-bookworm
COPY --from=highwater /usr/local/bin/highwater /usr/local/bin/highwater
