// The openai package for JavaScript and the Responses API of a running edge: prints one JSON object of what it saw.
import OpenAI from "openai";

const [, , baseURL, apiKey, model] = process.argv;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const input = "Where is the key?";
const parameters = { type: "object", properties: { where: { type: "string" } } };
const tools = [{ type: "function", name: "look", parameters, strict: false }];
const seen = {};

seen.whole = (await client.responses.create({ model, input, max_output_tokens: 200 })).output_text;

const stream = client.responses.stream({ model, input, tools, max_output_tokens: 200 });
seen.events = [];
for await (const event of stream) seen.events.push(event.type);
const { name, arguments: given } = (await stream.finalResponse()).output.at(-1);
seen.call = { name, arguments: JSON.parse(given) };

try {
  await client.responses.create({ model, input, previous_response_id: "resp_1" });
} catch (error) {
  seen.refused = { kind: error.constructor.name, status: error.status, param: error.param };
}
console.log(JSON.stringify(seen));
