"""The official OpenAI SDK against `ds4 serve` with nano, which really answers."""

import json
import sys

from openai import APIStatusError, AuthenticationError, BadRequestError, NotFoundError, OpenAI

client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="secret", max_retries=0)
OFF = {"thinking": {"type": "disabled"}}
SCHEMA = {
    "type": "object",
    "properties": {"minutes": {"type": "integer"}},
    "required": ["minutes"],
    "additionalProperties": False,
}
# Without bounds the likeliest number may have no end.
BOUNDED = {**SCHEMA, "properties": {"minutes": {"type": "integer", "minimum": 0, "maximum": 999}}}
TOOL = {"type": "function", "function": {"name": "set_timer", "description": "Set a timer", "parameters": SCHEMA}}
FLAT = {"type": "function", "name": "set_timer", "description": "Set a timer", "parameters": SCHEMA, "strict": True}
SUM, TIMER = "How much is 73 + 69?", "Set a timer for 38 minutes."
SET = "The timer is set for 38 minutes."


def ask(text, **options):
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return client.chat.completions.create(model="any", messages=messages, temperature=0, **options)


def respond(given, **options):
    return client.responses.create(model="any", input=given, temperature=0, **options)


# Chat: at once and with thinking, whole and streamed.
assert "142" in ask(SUM, extra_body=OFF).choices[0].message.content
answer = ask(SUM).choices[0]
assert "142" in answer.message.content and answer.message.reasoning_content and answer.finish_reason == "stop"
chunks = list(ask(SUM, stream=True, stream_options={"include_usage": True}))
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
thought = "".join(getattr(c.choices[0].delta, "reasoning_content", "") or "" for c in chunks if c.choices)
assert (text, thought) == (answer.message.content, answer.message.reasoning_content)
assert chunks[-1].usage.completion_tokens > 0
again = ask(SUM)
assert again.usage.prompt_tokens_details.cached_tokens > 0 and again.choices[0].message.content == text
short = ask(SUM, max_tokens=2, extra_body=OFF)
assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
probable = ask(SUM, logprobs=True, top_logprobs=3, extra_body=OFF).choices[0].logprobs.content
assert all(len(one.top_logprobs) == 3 and one.top_logprobs[0].token == one.token for one in probable)

# Tools: nano decides to call, is told the result, and answers.
for thinking in ({}, {"extra_body": OFF}):
    first = ask(TIMER, tools=[TOOL], **thinking)
    call = first.choices[0].message.tool_calls[0]
    assert first.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "set_timer" and json.loads(call.function.arguments) == {"minutes": 38}
    history = [
        {"role": "user", "content": TIMER},
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "ok"},
    ]
    second = ask(history, tools=[TOOL], **thinking)
    assert SET in second.choices[0].message.content, second
    # All of the first prompt but its last token: answers are computed anew.
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1
with client.chat.completions.stream(
    model="any", messages=[{"role": "user", "content": TIMER}], tools=[TOOL], temperature=0
) as stream:
    final = stream.get_final_completion()
assert json.loads(final.choices[0].message.tool_calls[0].function.arguments) == {"minutes": 38}
forced = ask("Hello", tools=[TOOL], tool_choice="required")
assert isinstance(json.loads(forced.choices[0].message.tool_calls[0].function.arguments)["minutes"], int)

# A schema is kept to, whatever nano would rather say.
form = {"type": "json_schema", "json_schema": {"name": "n", "schema": BOUNDED, "strict": True}}
for stream in (False, True):
    answer = ask(TIMER, response_format=form, max_tokens=100, stream=stream, extra_body=OFF)
    if stream:
        content = "".join(c.choices[0].delta.content or "" for c in answer if c.choices)
    else:
        content = answer.choices[0].message.content
    assert isinstance(json.loads(content)["minutes"], int), content

# Completions.
raw = client.completions.create(model="any", prompt="The capital of", max_tokens=5, temperature=0)
assert raw.choices[0].text and raw.usage.completion_tokens <= 5

# Responses: whole and streamed, tools there and back, a schema.
answer = respond(SUM, reasoning={"effort": "low"})
assert "142" in answer.output_text and [item.type for item in answer.output] == ["reasoning", "message"]
with client.responses.stream(model="any", input=SUM, temperature=0, reasoning={"effort": "low"}) as stream:
    kinds = [event.type for event in stream]
    final = stream.get_final_response()
assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
assert final.output_text == answer.output_text
first = respond(TIMER, tools=[FLAT], reasoning={"effort": "low"})
call = first.output[-1]
assert call.type == "function_call" and json.loads(call.arguments) == {"minutes": 38}
history = [{"role": "user", "content": TIMER}, *[item.model_dump(exclude_none=True) for item in first.output]]
history.append({"type": "function_call_output", "call_id": call.call_id, "output": "ok"})
second = respond(history, tools=[FLAT], reasoning={"effort": "low"})
assert SET in second.output_text and second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 1
form = {"format": {"type": "json_schema", "name": "n", "schema": BOUNDED, "strict": True}}
answer = respond(TIMER, text=form, max_output_tokens=100, reasoning={"effort": "none"})
assert isinstance(json.loads(answer.output_text)["minutes"], int)


# Errors.
def fails(kind, request):
    try:
        request()
    except kind as error:
        return error
    raise AssertionError(f"{kind} was expected")


assert fails(BadRequestError, lambda: ask(SUM, top_p=7)).param == "top_p"
assert fails(BadRequestError, lambda: ask("word " * 9000)).code == "context_length_exceeded"
impossible = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {"type": "string"}}}}
assert fails(BadRequestError, lambda: ask(SUM, response_format=impossible)).param == "response_format"
assert fails(BadRequestError, lambda: respond(SUM, previous_response_id="resp_1")).status_code == 400
stranger = OpenAI(base_url=sys.argv[1] + "/v1", api_key="wrong", max_retries=0)
fails(AuthenticationError, stranger.models.list)
lost = OpenAI(base_url=sys.argv[1] + "/nowhere", api_key="secret", max_retries=0)
fails(NotFoundError, lost.models.list)
assert fails(APIStatusError, lambda: client.post("/models", cast_to=object)).status_code == 405
print("openai for Python, nano answering: as expected")
