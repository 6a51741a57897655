"""Anthropic's Messages API with the anthropic package, whole, streamed, and counted: `pip install anthropic`."""

import os

from anthropic import Anthropic

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080
MODEL = os.environ.get("TANDEM_MODEL", "tandem-demo")
QUESTION = "Mia hid the red key in the old barn. Where did Mia hide the red key?"

client = Anthropic(base_url=URL, api_key=os.environ.get("TANDEM_KEY", "none"))
messages = [{"role": "user", "content": QUESTION}]
asked = {"model": MODEL, "messages": messages, "max_tokens": 40, "extra_body": {"temperature": 0}}

whole = client.messages.create(**asked)
print("".join(block.text for block in whole.content if block.type == "text"))

with client.messages.stream(**asked) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    print("\n" + str(stream.get_final_message().stop_reason))

print(client.messages.count_tokens(model=MODEL, messages=messages).input_tokens, "input tokens")
