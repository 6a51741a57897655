// Anthropic's Messages API in JavaScript, whole and streamed: `npm install` in this folder, then `node anthropic_messages.mjs`.
import Anthropic from "@anthropic-ai/sdk";

const url = process.env.TANDEM_URL ?? "http://127.0.0.1:8080"; // of the edge: tandem up --http-port 8080
const client = new Anthropic({ baseURL: url, apiKey: process.env.TANDEM_KEY ?? "none" });
const asked = {
  model: process.env.TANDEM_MODEL ?? "tandem-demo",
  messages: [{ role: "user", content: "Mia hid the red key in the old barn. Where did Mia hide the red key?" }],
  max_tokens: 40,
  temperature: 0,
};

const whole = await client.messages.create(asked);
console.log(whole.content.map((block) => block.text ?? "").join(""));

const stream = client.messages.stream(asked);
stream.on("text", (text) => process.stdout.write(text));
console.log("\n" + (await stream.finalMessage()).stop_reason);
