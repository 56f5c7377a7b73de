"""The official Anthropic SDK against `ds4 serve` with nano, which really answers."""

import sys

from anthropic import Anthropic, AuthenticationError, BadRequestError

client = Anthropic(base_url=sys.argv[1], api_key="secret", max_retries=0)
OFF = {"type": "disabled"}
TOOL = {
    "name": "set_timer",
    "description": "Set a timer",
    "input_schema": {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]},
}
SUM, TIMER = "How much is 73 + 69?", "Set a timer for 38 minutes."


def request(text, **options):
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return {"model": "any", "max_tokens": 300, "messages": messages, "temperature": 0, **options}


def ask(text, **options):
    # The SDK has no temperature for its newest models; the server takes one.
    body = request(text, **options)
    return client.messages.create(extra_body={"temperature": body.pop("temperature")}, **body)


answer = ask(SUM, thinking=OFF)
assert "142" in answer.content[0].text and answer.stop_reason == "end_turn"
answer = ask(SUM)
assert [block.type for block in answer.content] == ["thinking", "text"]
assert answer.content[0].thinking and "142" in answer.content[1].text
body = request(SUM)
with client.messages.stream(extra_body={"temperature": body.pop("temperature")}, **body) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == answer.content[1].text and final.content[0].thinking == answer.content[0].thinking
short = ask(SUM, thinking=OFF, max_tokens=2)
assert short.stop_reason == "max_tokens" and short.usage.output_tokens == 2
stopped = ask(SUM, thinking=OFF, stop_sequences=["142"])
assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "142"

# Tools: nano decides to call, is told the result, and answers.
for thinking in ({}, {"thinking": OFF}):
    first = ask(TIMER, tools=[TOOL], **thinking)
    call = first.content[-1]
    assert first.stop_reason == "tool_use" and (call.name, call.input) == ("set_timer", {"minutes": 38})
    history = [
        {"role": "user", "content": TIMER},
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "ok"}]},
    ]
    second = ask(history, tools=[TOOL], **thinking)
    assert second.content[-1].text == "The timer is set for 38 minutes.", second
    assert second.usage.cache_read_input_tokens > 0
body = request(TIMER, tools=[TOOL])
with client.messages.stream(extra_body={"temperature": body.pop("temperature")}, **body) as stream:
    assert stream.get_final_message().content[-1].input == {"minutes": 38}
forced = ask("Hello", tools=[TOOL], tool_choice={"type": "any"})
assert isinstance(forced.content[-1].input["minutes"], int)

counted = client.messages.count_tokens(model="any", messages=[{"role": "user", "content": SUM}], thinking=OFF)
usage = ask(SUM, thinking=OFF, max_tokens=1).usage
assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def fails(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind} was expected")


error = fails(BadRequestError, lambda: ask("word " * 9000))
assert "prompt is too long" in error.body["error"]["message"]
error = fails(BadRequestError, lambda: ask(SUM, max_tokens=0))
assert error.body["error"]["type"] == "invalid_request_error"
stranger = Anthropic(base_url=sys.argv[1], api_key="wrong", max_retries=0)
error = fails(AuthenticationError, stranger.models.list)
assert error.body["error"]["type"] == "authentication_error"
print("anthropic for Python, nano answering: as expected")
