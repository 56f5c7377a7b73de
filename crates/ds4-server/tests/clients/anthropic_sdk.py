"""The official Anthropic SDK against a server of scripted answers."""

import sys

from anthropic import Anthropic, BadRequestError

client = Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
OFF = {"type": "disabled"}
TOOL = {
    "name": "get_weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}


def ask(script, **options):
    messages = [{"role": "user", "content": f"[{script}]"}]
    return client.messages.create(model="any", max_tokens=300, messages=messages, **options)


answer = ask("text", thinking=OFF)
assert answer.content[0].text == "Hello there!" and answer.stop_reason == "end_turn"

answer = ask("thinking")
assert [block.type for block in answer.content] == ["thinking", "text"]
assert answer.content[0].thinking == "I am thinking."

answer = ask("thinking tools", tools=[TOOL])
call = answer.content[-1]
assert answer.stop_reason == "tool_use" and call.input == {"city": "Oslo", "days": 2}
messages = [
    {"role": "user", "content": "[thinking tools]"},
    {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": call.id, "content": "cold"},
        {"type": "text", "text": "[text]"},
    ]},
]
second = client.messages.create(model="any", max_tokens=300, messages=messages, tools=[TOOL])
assert second.usage.cache_read_input_tokens > 400

with client.messages.stream(
    model="any", max_tokens=300, tools=[TOOL], messages=[{"role": "user", "content": "[thinking tools]"}]
) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == "Let me look." and final.content[-1].input == {"city": "Oslo", "days": 2}

forced = ask("forced", tools=[TOOL], tool_choice={"type": "any"})
assert forced.content[-1].type == "tool_use" and "city" in forced.content[-1].input

counted = client.messages.count_tokens(model="any", messages=[{"role": "user", "content": "Hi"}])
assert counted.input_tokens > 3

try:
    ask("text", extra_body={"temperature": 9})
    raise AssertionError("an error was expected")
except BadRequestError as error:
    assert error.body["error"]["type"] == "invalid_request_error"
print("anthropic for Python: as expected")
