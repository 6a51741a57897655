"""An answer of a given form with Instructor: `pip install instructor openai`. The simulated engine has no grammars."""

import os
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080


class Key(BaseModel):
    """What the answer says of the key."""

    found: bool
    colour: Literal["red", "blue"]


client = instructor.from_openai(
    OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("TANDEM_KEY", "none")), mode=instructor.Mode.JSON_SCHEMA
)
key = client.create(
    response_model=Key,
    model=os.environ.get("TANDEM_MODEL", "tandem-demo"),
    messages=[{"role": "user", "content": "Mia hid the red key in the old barn. Which key did Mia hide?"}],
    max_retries=0,
)
print(repr(key))
