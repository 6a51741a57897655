// Anthropic's package for JavaScript against a running edge: prints one JSON object of what it saw.
import Anthropic from "@anthropic-ai/sdk";

const [, , baseURL, apiKey, model] = process.argv;
const client = new Anthropic({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Where is the key?" }];
const tools = [{ name: "look", input_schema: { type: "object", properties: { where: { type: "string" } } } }];
const seen = {};

seen.tokens = (await client.messages.countTokens({ model, messages, tools })).input_tokens;

const whole = await client.messages.create({ model, messages, max_tokens: 200 });
seen.whole = whole.content.at(-1).text;

const stream = client.messages.stream({ model, messages, tools, max_tokens: 200 });
seen.events = [];
for await (const event of stream) seen.events.push(event.type);
const final = await stream.finalMessage();
const { name, input } = final.content.at(-1);
seen.call = { name, input };
seen.stopReason = final.stop_reason;

try {
  await client.messages.create({ model, messages, max_tokens: 200, temperature: 9 });
} catch (error) {
  seen.refused = { kind: error.constructor.name, status: error.status, type: error.error.error.type };
}
console.log(JSON.stringify(seen));
