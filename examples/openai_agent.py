"""An agent with a tool, with OpenAI's Agents SDK: `pip install openai-agents`.

The model's chat template must support tools: `tandem up --model PATH --tool-parser hermes`.
"""

import os

from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080
MODEL = os.environ.get("TANDEM_MODEL", "tandem-demo")

set_tracing_disabled(disabled=True)  # it would send traces to OpenAI


@function_tool
def look(where: str) -> str:
    """Look there."""
    print(f"looks in the {where}")
    return f"The red key is in the {where}."


client = AsyncOpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("TANDEM_KEY", "none"))
agent = Agent(name="finder", tools=[look], model=OpenAIResponsesModel(MODEL, client))
print(Runner.run_sync(agent, "Look in the barn for the red key.", max_turns=5).final_output)
