"""The official OpenAI SDK against a server of scripted answers."""

import json
import sys

from openai import BadRequestError, OpenAI

client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
OFF = {"thinking": {"type": "disabled"}}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}


def ask(script, **options):
    messages = [{"role": "user", "content": f"[{script}]"}]
    return client.chat.completions.create(model="any", messages=messages, **options)


assert client.models.list().data[0].id == "deepseek-v4-flash"

# Chat: whole, streamed, thinking.
answer = ask("text", extra_body=OFF)
assert answer.choices[0].message.content == "Hello there!"
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
chunks = list(ask("text", stream=True, stream_options={"include_usage": True}, extra_body=OFF))
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello there!"
assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
assert ask("thinking").choices[0].message.reasoning_content == "I am thinking."

# Tools: there and back, whole and streamed.
answer = ask("thinking tools", tools=[TOOL])
call = answer.choices[0].message.tool_calls[0]
assert answer.choices[0].finish_reason == "tool_calls"
assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 2}
messages = [
    {"role": "user", "content": "[thinking tools]"},
    answer.choices[0].message.model_dump(exclude_none=True),
    {"role": "tool", "tool_call_id": call.id, "content": "cold"},
    {"role": "user", "content": "[text]"},
]
second = client.chat.completions.create(model="any", messages=messages, tools=[TOOL])
# All of the first prompt but its last token: answers are computed anew.
assert second.usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens - 1
parts = [c.choices[0].delta.tool_calls or [] for c in ask("tools", tools=[TOOL], stream=True, extra_body=OFF)]
arguments = "".join(p.function.arguments or "" for part in parts for p in part)
assert json.loads(arguments) == {"city": "Oslo", "days": 2}

# A schema is kept to, though the script says something else.
strict = {**SCHEMA, "properties": {"days": {"type": "integer"}}, "required": ["days"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "n", "schema": strict, "strict": True}}
answer = ask("text", response_format=form, max_tokens=200, extra_body=OFF)
if answer.choices[0].finish_reason == "stop":
    assert isinstance(json.loads(answer.choices[0].message.content)["days"], int)

# Log-probabilities.
answer = ask("text", logprobs=True, top_logprobs=2, extra_body=OFF)
first = answer.choices[0].logprobs.content[0]
assert first.logprob > -0.1 and len(first.top_logprobs) == 2

# Errors.
try:
    ask("text", temperature=9)
    raise AssertionError("an error was expected")
except BadRequestError as error:
    assert error.param == "temperature"

# Completions.
answer = client.completions.create(model="any", prompt="Hi", max_tokens=4)
assert answer.object == "text_completion"

# Responses: whole and streamed, with tools.
answer = client.responses.create(model="any", input="[thinking]", reasoning={"effort": "low"})
assert answer.output_text == "Hello there!"
assert [item.type for item in answer.output] == ["reasoning", "message"]
flat = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False}
kinds = []
with client.responses.stream(model="any", input="[thinking tools]", reasoning={"effort": "low"}, tools=[flat]) as stream:
    for event in stream:
        kinds.append(event.type)
    final = stream.get_final_response()
assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
call = final.output[-1]
assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Oslo", "days": 2}
history = [{"role": "user", "content": "[thinking tools]"}]
history += [item.model_dump(exclude_none=True) for item in final.output]
history += [
    {"type": "function_call_output", "call_id": call.call_id, "output": "cold"},
    {"role": "user", "content": "[text]"},
]
second = client.responses.create(model="any", input=history, reasoning={"effort": "low"}, tools=[flat])
assert second.usage.input_tokens_details.cached_tokens >= final.usage.input_tokens - 1
print("openai for Python: as expected")
