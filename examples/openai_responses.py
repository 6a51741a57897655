"""OpenAI's Responses API with the openai package, whole and streamed, over two turns: `pip install openai`."""

import os

from openai import OpenAI

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080
MODEL = os.environ.get("TANDEM_MODEL", "tandem-demo")
QUESTION = "Mia hid the red key in the old barn. Where did Mia hide the red key?"

client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("TANDEM_KEY", "none"))
asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 40}

# No response is stored: each turn sends the whole conversation.
conversation = [{"role": "user", "content": QUESTION}]
first = client.responses.create(**asked, input=conversation)
print(first.output_text)

conversation += [item.model_dump(exclude_none=True) for item in first.output]
conversation.append({"role": "user", "content": QUESTION})
for event in client.responses.create(**asked, input=conversation, stream=True):
    if event.type == "response.output_text.delta":
        print(event.delta, end="", flush=True)
    elif event.type in {"response.completed", "response.incomplete"}:
        print(f"\n{event.response.status}")
