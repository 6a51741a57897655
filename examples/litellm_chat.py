"""A chat with LiteLLM, whole and streamed: `pip install litellm`."""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import waits for a download of prices
import litellm

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080
MODEL = os.environ.get("TANDEM_MODEL", "tandem-demo")
QUESTION = "Mia hid the red key in the old barn. Where did Mia hide the red key?"

chat = {
    "model": f"openai/{MODEL}",  # the prefix selects LiteLLM's client of OpenAI's API
    "api_base": f"{URL}/v1",
    "api_key": os.environ.get("TANDEM_KEY", "none"),
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 40,
}

print(litellm.completion(**chat).choices[0].message.content)
for chunk in litellm.completion(**chat, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
