// The openai package for JavaScript against a running edge: prints one JSON object of what it saw.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "tandem-demo";
const messages = [{ role: "user", content: process.argv[3] }];
const seen = {};

const whole = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 40 });
seen.whole = whole.choices[0].message.content;
seen.usage = whole.usage;

seen.streamed = "";
const stream = await client.chat.completions.create({
  model, messages, temperature: 0, max_tokens: 40, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  seen.streamed += chunk.choices[0]?.delta?.content ?? "";
  seen.streamedUsage = chunk.usage ?? seen.streamedUsage;
}

const runner = client.chat.completions.stream({ model, messages, temperature: 0, max_tokens: 40 });
seen.final = await runner.finalContent();

const completion = await client.completions.create({ model, prompt: "Once upon a time", temperature: 0, max_tokens: 5 });
seen.completion = completion.choices[0].text;

seen.models = [];
for await (const entry of client.models.list()) seen.models.push(entry.id);

try {
  await client.chat.completions.create({ model, messages, temperature: 9 });
} catch (problem) {
  seen.refused = { kind: problem.constructor.name, status: problem.status, param: problem.param, code: problem.code };
}
console.log(JSON.stringify(seen));
