"""Tool calls with the openai package: `pip install openai`.

The model's chat template must support tools: `tandem up --model PATH --tool-parser hermes`.
"""

import json
import os

from openai import OpenAI

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080
MODEL = os.environ.get("TANDEM_MODEL", "tandem-demo")
PARAMETERS = {"type": "object", "properties": {"where": {"type": "string"}}, "required": ["where"]}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look there.", "parameters": PARAMETERS}}]


def look(where: str) -> str:
    """The tool that the model may call."""
    return f"The red key is in the {where}."


client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("TANDEM_KEY", "none"))
messages = [{"role": "user", "content": "Look in the barn for the red key."}]

# Each round: the model writes, and what it calls is run and sent back, until it calls nothing.
for _ in range(5):
    said = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, temperature=0, max_tokens=200)
    message = said.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    if not message.tool_calls:
        print(message.content)
        break
    for call in message.tool_calls:
        print(f"calls {call.function.name}({call.function.arguments})")
        result = look(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
