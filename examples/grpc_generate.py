"""A streamed chat over gRPC, with the generated code that is part of Tandem: `pip install .` in a checkout."""

import os

import grpc

from tandem.api.frontend.v1 import inference_service_pb2 as pb
from tandem.api.frontend.v1.inference_service_pb2_grpc import InferenceServiceStub

ADDRESS = os.environ.get("TANDEM_GRPC", "127.0.0.1:50051")  # of the frontend: tandem up --port 50051
QUESTION = "Mia hid the red key in the old barn. Where did Mia hide the red key?"

request = pb.GenerateRequest(sampling={"temperature": 0}, stopping={"max_tokens": 40})
request.chat.messages.add(role="user", content=QUESTION)

with grpc.insecure_channel(ADDRESS) as channel:
    try:
        # Leaving the loop early, or closing the channel, aborts the generation on both engines.
        for event in InferenceServiceStub(channel).Generate(request, timeout=60):
            print(event.chunk.text, end="", flush=True)
            if event.HasField("finish"):
                print(f"\n{event.finish.timings.kv_transfer_bytes} bytes of KV moved")
    except grpc.RpcError as failure:
        # The status has a sentence; its details (grpc_status.rpc_status) have the reason and the field.
        raise SystemExit(f"{failure.code().name}: {failure.details()}") from None
