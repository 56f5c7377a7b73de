// The official SDKs for TypeScript against `ds4 serve` with nano, which really answers.

import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const base = process.argv[2];
const schema = { type: "object", properties: { minutes: { type: "integer" } }, required: ["minutes"], additionalProperties: false };
const sum = "How much is 73 + 69?", timer = "Set a timer for 38 minutes.", set = "The timer is set for 38 minutes.";
const user = (content) => ({ role: "user", content });

const openai = new OpenAI({ baseURL: base + "/v1", apiKey: "secret", maxRetries: 0 });
const chat = (messages, options) => openai.chat.completions.create({ model: "any", temperature: 0, messages, ...options });
const tools = [{ type: "function", function: { name: "set_timer", description: "Set a timer", parameters: schema } }];

let answer = await chat([user(sum)]);
assert.match(answer.choices[0].message.content, /142/);
let text = "";
for await (const chunk of await chat([user(sum)], { stream: true })) text += chunk.choices[0]?.delta.content ?? "";
assert.equal(text, answer.choices[0].message.content);
const first = await chat([user(timer)], { tools });
const call = first.choices[0].message.tool_calls[0];
assert.deepEqual(JSON.parse(call.function.arguments), { minutes: 38 });
answer = await chat([user(timer), first.choices[0].message, { role: "tool", tool_call_id: call.id, content: "ok" }], { tools });
assert.equal(answer.choices[0].message.content, set);
const streamed = openai.chat.completions.stream({ model: "any", temperature: 0, messages: [user(timer)], tools });
const whole = await streamed.finalChatCompletion();
assert.deepEqual(JSON.parse(whole.choices[0].message.tool_calls[0].function.arguments), { minutes: 38 });
const bounded = { ...schema, properties: { minutes: { type: "integer", minimum: 0, maximum: 999 } } };
const format = { type: "json_schema", json_schema: { name: "n", schema: bounded, strict: true } };
answer = await chat([user(timer)], { response_format: format, max_tokens: 100, thinking: false });
assert.ok(Number.isInteger(JSON.parse(answer.choices[0].message.content).minutes));

const respond = (input, options) => openai.responses.create({ model: "any", temperature: 0, input, reasoning: { effort: "low" }, ...options });
const flat = [{ type: "function", name: "set_timer", description: "Set a timer", parameters: schema, strict: true }];
assert.match((await respond(sum)).output_text, /142/);
const response = await openai.responses.stream({ model: "any", temperature: 0, input: timer, reasoning: { effort: "low" }, tools: flat }).finalResponse();
const made = response.output.at(-1);
assert.deepEqual(JSON.parse(made.arguments), { minutes: 38 });
const result = { type: "function_call_output", call_id: made.call_id, output: "ok" };
assert.equal((await respond([user(timer), ...response.output, result], { tools: flat })).output_text, set);

const anthropic = new Anthropic({ baseURL: base, apiKey: "secret", maxRetries: 0 });
const ask = (messages, options) => ({ model: "any", max_tokens: 300, temperature: 0, messages, ...options });
const messageTools = [{ name: "set_timer", description: "Set a timer", input_schema: schema }];
let message = await anthropic.messages.create(ask([user(sum)]));
assert.deepEqual(message.content.map((block) => block.type), ["thinking", "text"]);
assert.match(message.content[1].text, /142/);
message = await anthropic.messages.stream(ask([user(timer)], { tools: messageTools })).finalMessage();
const use = message.content.at(-1);
assert.deepEqual([message.stop_reason, use.name, use.input], ["tool_use", "set_timer", { minutes: 38 }]);
const told = user([{ type: "tool_result", tool_use_id: use.id, content: "ok" }]);
const history = [user(timer), { role: "assistant", content: message.content }, told];
message = await anthropic.messages.create(ask(history, { tools: messageTools }));
assert.equal(message.content.at(-1).text, set);

const long = "word ".repeat(9000);
await assert.rejects(chat([user(long)]), { status: 400, code: "context_length_exceeded" });
await assert.rejects(chat([user(sum)], { top_p: 7 }), { status: 400, param: "top_p" });
await assert.rejects(anthropic.messages.create(ask([user(long)])), { status: 400 });
const stranger = new OpenAI({ baseURL: base + "/v1", apiKey: "wrong", maxRetries: 0 });
await assert.rejects(stranger.models.list(), { status: 401 });
console.log("openai and anthropic for TypeScript, nano answering: as expected");
