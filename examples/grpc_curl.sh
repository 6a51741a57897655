#!/bin/sh
# Calls over gRPC without generated code: the frontend describes its services by reflection.
# Runs grpcurl if it is on PATH, else buf (pip install buf-bin).
set -eu
address=${TANDEM_GRPC:-127.0.0.1:50051} # of the frontend: tandem up --port 50051
service=tandem.api.frontend.v1.InferenceService
generate='{"prompt": "Once upon a time", "sampling": {"temperature": 0}, "stopping": {"max_tokens": 8}}'

call() {
    if command -v grpcurl >/dev/null; then
        grpcurl -plaintext -d "$2" "$address" "$service/$1"
    else
        buf curl --protocol grpc --http2-prior-knowledge -d "$2" "http://$address/$service/$1"
    fi
}

call ListModels '{}'
call Generate "$generate"
