"""A chat with the openai package, whole and streamed: `pip install openai`."""

import os

from openai import BadRequestError, OpenAI

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080
MODEL = os.environ.get("TANDEM_MODEL", "tandem-demo")
QUESTION = "Mia hid the red key in the old barn. Where did Mia hide the red key?"

client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("TANDEM_KEY", "none"))
chat = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 40,
}

whole = client.chat.completions.create(**chat)
print(whole.choices[0].message.content)

for chunk in client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} completion tokens")

try:
    client.chat.completions.create(**{**chat, "temperature": 9})
except BadRequestError as refused:
    print(f"refused: {refused.param} ({refused.code})")
