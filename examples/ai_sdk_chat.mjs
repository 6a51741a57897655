// A chat with Vercel's AI SDK, whole and streamed: `npm install` in this folder, then `node ai_sdk_chat.mjs`.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const url = process.env.TANDEM_URL ?? "http://127.0.0.1:8080"; // of the edge: tandem up --http-port 8080
const tandem = createOpenAICompatible({ name: "tandem", baseURL: `${url}/v1`, apiKey: process.env.TANDEM_KEY ?? "none" });
const chat = {
  model: tandem(process.env.TANDEM_MODEL ?? "tandem-demo"),
  prompt: "Mia hid the red key in the old barn. Where did Mia hide the red key?",
  temperature: 0,
  maxOutputTokens: 40,
  maxRetries: 0,
};

console.log((await generateText(chat)).text);

for await (const text of streamText(chat).textStream) process.stdout.write(text);
console.log();
