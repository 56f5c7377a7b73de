"""DeepSeek V4's chat format: messages -> a document of marker ids and text pieces.

Markers are token ids, everything between two markers is one run of plain text. Inside
texts, \\x02 and \\x03 enclose what an answer hinges on (it gets more weight in training);
they are removed before tokenisation. A text may also be a `Filler` (see corpus_text.py): text
that is already tokenised.
"""

import json

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK, DSML = "<think>", "</think>", "｜DSML｜"

PROMPT, ANSWER, VALUE = 0.03, 1.0, 4.0  # cross-entropy weights

EFFORT_HIGH = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

TOOLS_BEFORE = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
TOOLS_AFTER = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"


class Doc:
    """A document as a list of items: ("id", name, weight), ("text", text or filler, weight),
    ("begin", task) and ("end", None) around what the model has to generate."""

    def __init__(self):
        self.items = []

    def marker(self, name, weight=PROMPT):
        self.items.append(("id", name, weight))

    def text(self, text, weight=PROMPT):
        """Text may contain \\x02 ... \\x03; or it is a filler."""
        if not isinstance(text, str):
            self.items.append(("text", text, weight))
            return
        for i, piece in enumerate(text.replace("\x03", "\x02").split("\x02")):
            if piece:
                heavy = i % 2 == 1 and weight >= ANSWER
                self.items.append(("text", piece, VALUE if heavy else weight))

    def with_markers(self, text, weight):
        """Text in which the DSML and think markers are real markers."""
        rest = text
        while rest:
            at, name = min(((rest.find(m), m) for m in (DSML, THINK, END_THINK) if m in rest), default=(len(rest), None))
            self.text(rest[:at], weight)
            if name:
                self.marker(name, weight)
            rest = rest[at + len(name or "") :]


class Chat(Doc):
    """Turns are added in order; `thinking` and `tools` hold for the whole conversation."""

    def __init__(self, system="", thinking=False, tools=(), effort=False):
        super().__init__()
        self.thinking, self.tools = thinking, tools
        self.messages = [{"role": "system", "content": system}] if system else []
        self.marker(BOS, 0.0)
        if effort and thinking:
            self.text(EFFORT_HIGH, 0.0)
        self.text(system)
        if tools:
            self.text("\n\n", 0.0)
            self.with_markers(TOOLS_BEFORE, 0.0)
            self.text("\n".join(schema_line(t) for t in tools), PROMPT)
            self.text(TOOLS_AFTER, 0.0)

    def user(self, *pieces):
        self.marker(USER, 0.0)
        for p in pieces:
            self.text(p)
        self.messages.append({"role": "user", "content": plain(*pieces)})

    def results(self, *results):
        self.marker(USER, 0.0)
        self.text("\n\n".join(f"<tool_result>{r}</tool_result>" for r in results))
        self.messages += [{"role": "tool", "content": plain(r)} for r in results]

    def assistant(self, text="", think=None, calls=(), task="chat", last=True):
        """`last`: no user turn follows, so that reasoning is kept in the history."""
        self.marker(ASSISTANT, 0.0)
        keeps = self.thinking and (last or self.tools)
        if keeps:
            self.marker(THINK, 0.0)
            self.items.append(("begin", task))
            self.text(think or "", ANSWER)
            self.marker(END_THINK, ANSWER)
        else:
            self.marker(END_THINK, 0.0)
            self.items.append(("begin", task))
        self.text(text, ANSWER)
        if calls:
            self.with_markers("\n\n" + render_calls(calls), ANSWER)
        self.marker(EOS, ANSWER)
        self.items.append(("end", None))
        self.messages.append({"role": "assistant", "content": plain(text)})
        if keeps and think:
            self.messages[-1]["reasoning"] = plain(think)
        if calls:
            self.messages[-1]["tool_calls"] = [{"name": n, "arguments": {k: plain_value(v) for k, v in a.items()}} for n, a in calls]


def plain(*pieces):
    return "".join(p if isinstance(p, str) else p.text() for p in pieces).replace("\x02", "").replace("\x03", "")


def plain_value(v):
    return plain(v) if isinstance(v, str) else v


def schema_line(tool):
    return json.dumps({"name": tool["name"], "description": tool["description"], "parameters": tool["parameters"]}, ensure_ascii=False)


def render_calls(calls):
    """[(name, {parameter: value})] -> the DSML block."""
    out = [f"<{DSML}tool_calls>"]
    for name, arguments in calls:
        out.append(f'<{DSML}invoke name="{name}">')
        for key, value in arguments.items():
            is_text = isinstance(value, str)
            shown = value if is_text else json.dumps(value, ensure_ascii=False)
            out.append(f'<{DSML}parameter name="{key}" string="{"true" if is_text else "false"}">{shown}</{DSML}parameter>')
        out.append(f"</{DSML}invoke>")
    return "\n".join([*out, f"</{DSML}tool_calls>"])
