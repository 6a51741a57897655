"""An agent with a tool, with Pydantic AI: `pip install "pydantic-ai-slim[openai]"`.

The model's chat template must support tools: `tandem up --model PATH --tool-parser hermes`.
"""

import os

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080

provider = OpenAIProvider(base_url=f"{URL}/v1", api_key=os.environ.get("TANDEM_KEY", "none"))
agent = Agent(OpenAIChatModel(os.environ.get("TANDEM_MODEL", "tandem-demo"), provider=provider))


@agent.tool_plain
def look(where: str) -> str:
    """Look there."""
    print(f"looks in the {where}")
    return f"The red key is in the {where}."


print(agent.run_sync("Look in the barn for the red key.").output)
