"""A chat with LangChain, whole and streamed: `pip install langchain-openai`."""

import os

from langchain_openai import ChatOpenAI

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080
MODEL = os.environ.get("TANDEM_MODEL", "tandem-demo")
QUESTION = "Mia hid the red key in the old barn. Where did Mia hide the red key?"

model = ChatOpenAI(
    base_url=f"{URL}/v1",
    api_key=os.environ.get("TANDEM_KEY", "none"),
    model=MODEL,
    temperature=0,
    max_tokens=40,
)

print(model.invoke(QUESTION).content)
for chunk in model.stream(QUESTION):
    print(chunk.content, end="", flush=True)
print()
