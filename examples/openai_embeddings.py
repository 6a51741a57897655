"""Embeddings with OpenAI's SDK, and which text is nearest to a question: `pip install openai`."""

import os

import openai

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --embedding-model embedder=PATH
MODEL = os.environ.get("TANDEM_EMBEDDING_MODEL", "embedder")
TEXTS = ["Mia hid the red key in the old barn.", "Theo left the orange spoon in the dark forest."]
QUESTION = "Mia hid the red key in the old barn."

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("TANDEM_KEY", "none"))
response = client.embeddings.create(model=MODEL, input=[QUESTION, *TEXTS])
question, *texts = (entry.embedding for entry in response.data)


def likeness(one: list[float], other: list[float]) -> float:
    """The cosine: embeddings have length 1."""
    return sum(a * b for a, b in zip(one, other, strict=True))


nearest = max(range(len(TEXTS)), key=lambda place: likeness(question, texts[place]))
print(f"{len(question)} numbers each, {response.usage.prompt_tokens} tokens")
print(f"nearest: {TEXTS[nearest]}")
try:
    client.embeddings.create(model=MODEL, input="")
except openai.BadRequestError as refusal:
    print(f"refused: {refusal.param} ({refusal.code})")
