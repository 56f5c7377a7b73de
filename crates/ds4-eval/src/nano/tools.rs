//! Tools: choose the right one and call it, or answer with what it returned.

use fastrand::Rng;
use serde_json::{Map, Value, json};

use super::{
    pick, sample,
    words::{CITIES, COLOURS, NOUNS, file_name, number, value},
};

/// A request, the tool for it, its arguments, what it returns, and what the answer must contain.
struct Use {
    declaration: Value,
    request: String,
    name: &'static str,
    arguments: Value,
    result: String,
    expected: Vec<String>,
}

const USES: &[fn(&mut Rng) -> Use] =
    &[weather, timer, email, light, search, read_file, write_file, edit_file, shell];

/// The model has to call one of one to four tools.
pub(super) fn call(rng: &mut Rng) -> Value {
    let (used, tools) = scene(rng, USES);
    json!({
        "messages": [{ "role": "user", "content": used.request }],
        "tools": tools, "thinking": rng.bool(),
        "grade": { "type": "tool_call", "name": used.name, "arguments": used.arguments },
    })
}

/// The call was made and has a result that the answer must give.
pub(super) fn result(rng: &mut Rng) -> Value {
    let (used, tools) = scene(rng, &[weather, search, read_file, shell]);
    let call = json!({ "id": "call_1", "type": "function",
        "function": { "name": used.name, "arguments": used.arguments } });
    json!({
        "messages": [
            { "role": "user", "content": used.request },
            { "role": "assistant", "content": "", "tool_calls": [call] },
            { "role": "tool", "tool_call_id": "call_1", "content": used.result },
        ],
        "tools": tools, "thinking": false,
        "grade": { "type": "contains", "answer": used.expected },
    })
}

/// What one of `candidates` asks for, and its tool among up to three others.
fn scene(rng: &mut Rng, candidates: &[fn(&mut Rng) -> Use]) -> (Use, Vec<Value>) {
    let used = pick(rng, candidates)(rng);
    let count = rng.usize(..=3);
    let mut tools = vec![used.declaration.clone()];
    for other in sample(rng, USES, USES.len()) {
        let other = other(rng);
        if tools.len() <= count && other.name != used.name {
            tools.push(other.declaration);
        }
    }
    rng.shuffle(&mut tools);
    (used, tools)
}

/// The declaration of a function; all parameters but `optional` are required.
fn declare(name: &str, description: &str, parameters: &[(&str, &str)], optional: &[&str]) -> Value {
    let property = |(name, kind): &(&str, &str)| ((*name).to_owned(), json!({ "type": kind }));
    let properties: Map<String, Value> = parameters.iter().map(property).collect();
    let required: Vec<&str> =
        parameters.iter().map(|(name, _)| *name).filter(|name| !optional.contains(name)).collect();
    json!({ "type": "function", "function": { "name": name, "description": description,
        "parameters": { "type": "object", "properties": properties, "required": required } } })
}

fn weather(rng: &mut Rng) -> Use {
    let (city, degrees) = (pick(rng, CITIES), rng.u32(2..36));
    let sky = pick(rng, &["sunny", "cloudy", "rainy", "windy", "foggy"]);
    let parameters = [("city", "string"), ("days", "integer")];
    Use {
        declaration: declare("get_weather", "Get the weather for a city", &parameters, &["days"]),
        request: pick(rng, &["What is the weather in {}?", "How is the weather in {}?"])
            .replace("{}", city),
        name: "get_weather",
        arguments: json!({ "city": city }),
        result: format!("{{\"temperature\": {degrees}, \"sky\": \"{sky}\"}}"),
        expected: vec![degrees.to_string(), sky.to_owned()],
    }
}

fn timer(rng: &mut Rng) -> Use {
    let minutes = rng.u32(2..91);
    Use {
        declaration: declare("set_timer", "Set a timer", &[("minutes", "integer")], &[]),
        request: format!("Set a timer for {minutes} minutes."),
        name: "set_timer",
        arguments: json!({ "minutes": minutes }),
        result: "ok".to_owned(),
        expected: vec![minutes.to_string()],
    }
}

fn email(rng: &mut Rng) -> Use {
    let name = pick(rng, &["anna", "ben", "clara", "david", "emma", "henry", "maria", "peter"]);
    let (to, subject) =
        (format!("{name}@example.com"), format!("{} {}", pick(rng, COLOURS), pick(rng, NOUNS)));
    let parameters = [("to", "string"), ("subject", "string")];
    Use {
        declaration: declare("send_email", "Send an email", &parameters, &[]),
        request: format!("Send an email to {to} with the subject \"{subject}\"."),
        name: "send_email",
        arguments: json!({ "to": to, "subject": subject }),
        result: "sent".to_owned(),
        expected: vec![to],
    }
}

fn light(rng: &mut Rng) -> Use {
    let room = pick(rng, &["kitchen", "garden", "hall", "office", "garage", "bedroom"]);
    let (on, word) = if rng.bool() { (true, "on") } else { (false, "off") };
    let parameters = [("room", "string"), ("on", "boolean")];
    Use {
        declaration: declare("set_light", "Turn a light on or off", &parameters, &[]),
        request: format!("Turn {word} the light in the {room}."),
        name: "set_light",
        arguments: json!({ "room": room, "on": on }),
        result: "ok".to_owned(),
        expected: vec![room.to_owned()],
    }
}

fn search(rng: &mut Rng) -> Use {
    let topic = format!("{} {}", pick(rng, COLOURS), pick(rng, NOUNS));
    let found = sample(rng, NOUNS, 2).join(" ");
    Use {
        declaration: declare("search_web", "Search the web", &[("query", "string")], &[]),
        request: format!("Search the web for {topic}."),
        name: "search_web",
        arguments: json!({ "query": topic }),
        result: format!("1 result: {found}"),
        expected: vec![found],
    }
}

fn read_file(rng: &mut Rng) -> Use {
    let path = file_name(rng);
    let keys = sample(rng, NOUNS, 4);
    let lines: Vec<(&str, String)> = keys.into_iter().map(|key| (key, value(rng))).collect();
    let (key, wanted) = lines[rng.usize(..lines.len())].clone();
    let text: Vec<String> = lines.iter().map(|(key, value)| format!("{key} = {value}")).collect();
    Use {
        declaration: declare("read_file", "Read a file", &[("path", "string")], &[]),
        request: format!("What is {key} in {path}?"),
        name: "read_file",
        arguments: json!({ "path": path }),
        result: text.join("\n"),
        expected: vec![wanted],
    }
}

fn write_file(rng: &mut Rng) -> Use {
    let path = file_name(rng);
    let content = format!("{} {}", sample(rng, NOUNS, 2).join(" "), value(rng));
    let parameters = [("path", "string"), ("content", "string")];
    Use {
        declaration: declare("write_file", "Write a file", &parameters, &[]),
        request: format!("Write \"{content}\" to {path}."),
        name: "write_file",
        arguments: json!({ "path": path, "content": content }),
        result: "ok".to_owned(),
        expected: vec![path],
    }
}

fn edit_file(rng: &mut Rng) -> Use {
    let (path, old, new) = (file_name(rng), value(rng), value(rng));
    let parameters = [("path", "string"), ("old_text", "string"), ("new_text", "string")];
    Use {
        declaration: declare("edit_file", "Replace text in a file", &parameters, &[]),
        request: format!("Replace \"{old}\" by \"{new}\" in {path}."),
        name: "edit_file",
        arguments: json!({ "path": path, "old_text": old, "new_text": new }),
        result: "ok".to_owned(),
        expected: vec![path],
    }
}

fn shell(rng: &mut Rng) -> Use {
    let (path, lines) = (file_name(rng), number(rng, 3));
    Use {
        declaration: declare("bash", "Run a shell command", &[("command", "string")], &[]),
        request: format!("How many lines does {path} have?"),
        name: "bash",
        arguments: json!({ "command": format!("wc -l {path}") }),
        result: format!("{lines} {path}"),
        expected: vec![lines.to_string()],
    }
}
