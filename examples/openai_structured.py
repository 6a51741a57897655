"""Structured output with the openai package and pydantic: `pip install openai`. The engine's grammar enforces it."""

import os
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080
MODEL = os.environ.get("TANDEM_MODEL", "tandem-demo")


class Key(BaseModel):
    """What the answer must be."""

    found: bool
    colour: Literal["red", "blue", "orange"]


client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("TANDEM_KEY", "none"))
said = client.chat.completions.parse(
    model=MODEL,
    messages=[{"role": "user", "content": "Mia hid the red key in the old barn. Which key is it?"}],
    response_format=Key,
    temperature=0,
    max_tokens=200,
)
print(repr(said.choices[0].message.parsed))
