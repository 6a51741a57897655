"""Several streamed chats at once with the openai package and asyncio: `pip install openai`."""

import asyncio
import os

from openai import AsyncOpenAI

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8080")  # of the edge: tandem up --http-port 8080
MODEL = os.environ.get("TANDEM_MODEL", "tandem-demo")
QUESTIONS = (
    "Mia hid the red key in the old barn. Where did Mia hide the red key?",
    "Sam put the blue ball near the warm window. Where did Sam put the blue ball?",
)


async def answer(client: AsyncOpenAI, question: str) -> str:
    """The text of one streamed chat; closing the stream aborts the generation on both engines."""
    messages = [{"role": "user", "content": question}]
    chat = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 40}
    stream = await client.chat.completions.create(**chat, stream=True)
    async with stream:
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def main() -> None:
    """Ask all questions at the same time."""
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("TANDEM_KEY", "none")) as client:
        for text in await asyncio.gather(*(answer(client, question) for question in QUESTIONS)):
            print(text)


asyncio.run(main())
