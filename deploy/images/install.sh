#!/bin/sh
# One step of a build stage: sh install.sh libraries|cpu-engine|gpu-engine|envoy|tandem
#
# Pinned dependencies are installed into /opt/libraries, Tandem into /opt/tandem: a new release then changes only a layer
# of about 1 MB. pip runs in a separate environment, which is not part of any image.
# The index, its credentials and CAs come from build arguments and secrets (docs/guide/deploy.md) and end up in no layer.
set -eu

libraries=/opt/libraries
app=/opt/tandem
pins=requirements

# A build argument that is not set arrives as an empty variable, which pip would use as an address.
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST TORCH_INDEX_URL; do
    eval "value=\${$name:-}"
    [ -n "$value" ] || unset "$name"
done
if [ -s /run/secrets/ca_bundle ]; then
    export PIP_CERT=/run/secrets/ca_bundle SSL_CERT_FILE=/run/secrets/ca_bundle
fi
if [ -s /run/secrets/pip_conf ]; then
    export PIP_CONFIG_FILE=/run/secrets/pip_conf
fi
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_DEFAULT_TIMEOUT=180

if [ ! -x "$libraries/bin/python" ]; then
    python3 -m venv /opt/pip
    python3 -m venv --without-pip "$libraries"
    packages=$("$libraries/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    echo "$app${packages#"$libraries"}" > "$packages/tandem.pth"
fi

install() {
    /opt/pip/bin/python -m pip --python "$libraries/bin/python" install --quiet "$@"
}

case "${1:-}" in
libraries)
    install -r "$pins/base.txt"
    # Only speeds up downloads from a model hub, which the image never does.
    /opt/pip/bin/python -m pip --python "$libraries/bin/python" uninstall --quiet --yes hf_xet
    ;;
cpu-engine)
    # As in tools/setup_environment.py: PyTorch separately, because its CPU build comes from another index.
    install -r "$pins/torch.txt" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
    install -c "$pins/torch.txt" -r "$pins/base.txt" -r "$pins/cpu-engine.txt"
    install --no-deps -r "$pins/cpu-engine-nodeps.txt"
    # Headers and static archives are only needed to compile, and the image has no compiler.
    rm -rf "$libraries"/lib/python3*/site-packages/torch/include
    find "$libraries" -name '*.a' -delete
    ;;
gpu-engine)
    # The stock engine with its own dependencies first; our pins follow and override them.
    install -r "$pins/gpu-image.txt"
    install -r "$pins/base.txt"
    ;;
envoy)
    install -r "$pins/edge.txt"
    ;;
tandem)
    install --no-deps --prefix "$app" .
    ;;
*)
    echo "usage: install.sh libraries|cpu-engine|gpu-engine|envoy|tandem" >&2
    exit 2
    ;;
esac
