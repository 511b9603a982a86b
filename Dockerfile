# The managed plugin's root file system as an image, for those who build with Docker:
# the same as `make plugin` makes, by the same script. See docs/managed-plugin.rst.
FROM debian:12-slim AS assembled
ARG CEPH=no
ARG SOURCE_DATE_EPOCH=0
RUN apt-get update -qq \
    && apt-get install -qqy --no-install-recommends mmdebstrap
COPY LICENSE plugin-config.json /source/
COPY packaging/plugin /source/packaging/plugin
COPY volplugin /source/volplugin
# A build has no right to mount.
RUN SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" CEPH="$CEPH" \
    /source/packaging/plugin/assemble /plugin

FROM scratch
COPY --from=assembled /plugin/rootfs/ /
