// A chat with the openai package for JavaScript, whole and streamed: `npm install` in this folder, then `node openai_chat.mjs`.
import OpenAI from "openai";

const url = process.env.TANDEM_URL ?? "http://127.0.0.1:8080"; // of the edge: tandem up --http-port 8080
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.TANDEM_KEY ?? "none" });
const chat = {
  model: process.env.TANDEM_MODEL ?? "tandem-demo",
  messages: [{ role: "user", content: "Mia hid the red key in the old barn. Where did Mia hide the red key?" }],
  temperature: 0,
  max_tokens: 40,
};

const whole = await client.chat.completions.create(chat);
console.log(whole.choices[0].message.content);

for await (const chunk of await client.chat.completions.create({ ...chat, stream: true })) {
  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
}
console.log();
