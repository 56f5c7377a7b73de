// The official SDKs for TypeScript against a server of scripted answers.

import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const base = process.argv[2];
const schema = { type: "object", properties: { city: { type: "string" }, days: { type: "integer" } }, required: ["city"] };
const expected = { city: "Oslo", days: 2 };
const user = (script) => [{ role: "user", content: `[${script}]` }];

const openai = new OpenAI({ baseURL: base + "/v1", apiKey: "none", maxRetries: 0 });
const tools = [{ type: "function", function: { name: "get_weather", parameters: schema } }];
const chat = (options) => openai.chat.completions.create({ model: "any", ...options });

let answer = await chat({ messages: user("text"), thinking: false });
assert.equal(answer.choices[0].message.content, "Hello there!");
let text = "";
for await (const chunk of await chat({ messages: user("text"), thinking: false, stream: true }))
  text += chunk.choices[0]?.delta.content ?? "";
assert.equal(text, "Hello there!");
answer = await chat({ messages: user("thinking tools"), tools });
assert.deepEqual(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments), expected);
const runner = openai.chat.completions.stream({ model: "any", messages: user("thinking tools"), tools });
const final = await runner.finalChatCompletion();
assert.deepEqual(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments), expected);
await assert.rejects(chat({ messages: user("text"), temperature: 9 }), { status: 400, param: "temperature" });

const flat = [{ type: "function", name: "get_weather", parameters: schema, strict: false }];
const response = await openai.responses.create({ model: "any", input: "[thinking]", reasoning: { effort: "low" } });
assert.equal(response.output_text, "Hello there!");
const stream = openai.responses.stream({ model: "any", input: "[thinking tools]", reasoning: { effort: "low" }, tools: flat });
const streamed = await stream.finalResponse();
assert.deepEqual(JSON.parse(streamed.output.at(-1).arguments), expected);

const anthropic = new Anthropic({ baseURL: base, apiKey: "none", maxRetries: 0 });
const messageTools = [{ name: "get_weather", input_schema: schema }];
const ask = (script, options) => ({ model: "any", max_tokens: 300, messages: user(script), ...options });
let message = await anthropic.messages.create(ask("thinking"));
assert.deepEqual(message.content.map((block) => block.type), ["thinking", "text"]);
message = await anthropic.messages.stream(ask("thinking tools", { tools: messageTools })).finalMessage();
assert.equal(message.stop_reason, "tool_use");
assert.deepEqual(message.content.at(-1).input, expected);
await assert.rejects(anthropic.messages.create(ask("text", { temperature: 9 })), { status: 400 });
console.log("openai and anthropic for TypeScript: as expected");
