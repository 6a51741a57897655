#!/bin/sh
# The HTTP API by hand: OpenAI's and Anthropic's paths, and Tandem's own.
set -eu
url=${TANDEM_URL:-http://127.0.0.1:8080} # of the edge: tandem up --http-port 8080
model=${TANDEM_MODEL:-tandem-demo}
messages='[{"role": "user", "content": "Mia hid the red key in the old barn. Where did Mia hide the red key?"}]'

post() {
    printf '\n--- %s\n' "$1"
    # -N shows a stream as it arrives; --fail-with-body ends with an error status, and shows the error.
    curl -sN --fail-with-body "$url$1" -H 'content-type: application/json' \
        -H "authorization: Bearer ${TANDEM_KEY:-none}" -d "$2"
}

post /v1/chat/completions "{\"model\": \"$model\", \"messages\": $messages, \"temperature\": 0, \"max_tokens\": 40}"
post /v1/chat/completions "{\"model\": \"$model\", \"messages\": $messages, \"max_tokens\": 8, \"stream\": true}"
post /v1/completions "{\"model\": \"$model\", \"prompt\": \"Once upon a time\", \"max_tokens\": 8}"
post /v1/responses "{\"model\": \"$model\", \"input\": \"Once upon a time\", \"max_output_tokens\": 8}"
post /v1/messages "{\"model\": \"$model\", \"messages\": $messages, \"max_tokens\": 8}"
post /v1/generate '{"prompt": "Once upon a time", "stopping": {"max_tokens": 8}, "sampling": {"temperature": 0}}'
post /v1/tokenize '{"prompt": "Once upon a time"}'
